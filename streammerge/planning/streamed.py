"""The order of the bytes of an output that is written from its first byte to its last, into an object store.

A job with several parts, such as codes and scales, has a *main* part, the largest, and *side* parts. Jobs are merged in the
order of their main parts, which go to the store as they come. Side parts are held in memory until their place comes. One
that lies before the main part of its own job is needed *early*: the tensors with such parts are merged twice, once for
their side parts alone. Where the parts of each job lie together and are written whole, none is a side part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from streammerge.planning.schedule import Chunk, Step

if TYPE_CHECKING:
    from streammerge.planning.job import Job
    from streammerge.planning.layout import Layout, Slot

SHARDS_AT_ONCE = 2
"""Shards of which side parts are held: one that is being uploaded, and the next."""


def sides_in(layout: Layout, shard: int) -> list[Slot]:
    """Return the side parts of a shard that have bytes, in file order."""
    if layout.adjacent:
        return []
    sides = [
        layout.slots[job][part]
        for job, part in layout.shards[shard].parts
        if part != main_part(layout, job) and layout.slots[job][part].nbytes
    ]
    return sorted(sides, key=lambda slot: slot.offset)


def main_part(layout: Layout, job: int) -> int:
    """Return the number of a job's main part."""
    slots = layout.slots[job]
    return max(range(len(slots)), key=lambda part: slots[part].nbytes)


def order_in(layout: Layout, shard: int) -> list[int]:
    """Return the ordinals of the jobs of a shard in the order of their main parts."""
    ordinals = {job for job, _ in layout.shards[shard].parts}
    return sorted(ordinals, key=lambda job: (layout.slots[job][main_part(layout, job)].offset, job))


def held_nbytes(layout: Layout) -> int:
    """Return the most bytes of side parts that are held."""
    sums = [sum(slot.nbytes for slot in sides_in(layout, shard)) for shard in range(len(layout.shards))]
    return SHARDS_AT_ONCE * max(sums, default=0)


def rehearsed(steps: Iterable[Step], layout: Layout) -> Iterator[Step]:
    """Yield the steps of one shard; before them, once more, those of tensors with parts that are needed early."""
    every = list(steps)
    early = {
        job
        for job in {piece.job for step in every if isinstance(step, Chunk) for piece in step.pieces}
        if _is_early(layout, job)
    }
    for step in every:
        if not isinstance(step, Chunk):
            yield step
        elif pieces := tuple(piece for piece in step.pieces if piece.job in early):
            yield replace(step, pieces=pieces, rehearsal=True)
    yield from (step for step in every if isinstance(step, Chunk))


def reads_twice(layout: Layout, jobs: Sequence[Job]) -> int:
    """Return the bytes that are read a second time, for parts that are needed early."""
    return sum(job.input_bytes + job.fisher_bytes for job in jobs if _is_early(layout, job.ordinal))


def _is_early(layout: Layout, job: int) -> bool:
    if layout.adjacent:
        return False
    main = layout.slots[job][main_part(layout, job)]
    return any(slot.nbytes and slot.offset < main.offset for slot in layout.slots[job])
