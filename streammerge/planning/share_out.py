"""How well a merge can be shared between processes: what each does, how much is idle, and what bounds the time.

Pure: numbers in, values out. A shard is the unit of work; its work is the bytes that are read and written for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heapreplace
from typing import Literal

from streammerge.planning.plan import MergePlan
from streammerge.records import dataclass

Bound = Literal["workers", "store", "shards"]


@dataclass(frozen=True)
class Shares:
    """A merge shared between some processes."""

    workers: int
    shards: int
    most: int
    """The most shards that one process does."""
    idle: float
    """The share of all processes' time in which they have nothing to do, at the end."""
    seconds: float | None
    """Seconds from the first claim to the last record; None if no bandwidth is known."""
    bound: Bound
    """What bounds the time: the bandwidth of each process, that of the store, or too few shards."""
    better: int | None
    """A shard size in bytes with which less than a tenth is idle, if more is now; None otherwise."""


_IDLE = 0.1
"""The share of idle time above which the shards are what bounds a merge."""
_SHARDS_EACH = 6
"""Shards for each process that keep idle time below a tenth, whatever their sizes."""


def share_out(plan: MergePlan, workers: int, rate: float | None, store_rate: float | None) -> Shares:
    """Return how a plan is shared out.

    Parameters
    ----------
    rate
        Bytes per second that one process reads and writes; None: not known.
    store_rate
        Bytes per second that the store gives all processes together; None: enough.
    """
    work = [
        shard.nbytes
        + sum(
            plan.jobs[job].input_bytes + plan.jobs[job].fisher_bytes
            for job in {job for job, _ in shard.parts}
        )
        for shard in plan.layout.shards
    ]
    longest, most = _longest(work, workers)
    total = sum(work)
    idle = 1 - total / max(1, workers * longest)
    passes = plan.bytes_of_passes()
    whole = total + passes
    alone = None if rate is None else (longest + passes / workers) / rate
    store = None if store_rate is None else whole / store_rate
    seconds = max((one for one in (alone, store) if one is not None), default=None)
    bound: Bound = "shards" if idle > _IDLE else "workers"
    if store is not None and (alone is None or store >= alone):
        bound = "store"
    size = max(1, plan.layout.nbytes // (_SHARDS_EACH * workers))
    largest = max((shard.nbytes for shard in plan.layout.shards), default=0)
    better = size if idle > _IDLE and size < largest else None
    return Shares(workers, len(work), most, idle, seconds, bound, better)


def _longest(work: Sequence[int], workers: int) -> tuple[int, int]:
    """Return the work of the process that has most, and the most shards of one, if each takes the next when it is free."""
    free = [(0, 0, worker) for worker in range(workers)]
    heapify(free)
    for one in sorted(work, reverse=True):
        done, count, worker = free[0]
        heapreplace(free, (done + one, count + 1, worker))
    return max((done for done, _, _ in free), default=0), max((count for _, count, _ in free), default=0)
