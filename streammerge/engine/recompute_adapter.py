"""Recompute modules of an adapter from its inputs, and compare the bits.

Their factors are computed again into a draft of the file of factors, a temporary file, and compared from there.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streammerge.checkpoint.weight_names import ADAPTER_WEIGHTS
from streammerge.engine.opening import with_stages
from streammerge.engine.recompute import all_but, check_inputs, pieces_of
from streammerge.engine.scheduler import Scheduler, Unrecorded
from streammerge.engine.worker import RunSpec, Worker
from streammerge.errors import printable
from streammerge.formats.refs import TensorRef
from streammerge.formats.safetensors import read_header
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.output.check import Recomputed
from streammerge.output.identity import identify
from streammerge.output.journal import Progress
from streammerge.output.place import place_of
from streammerge.planning.low_rank.adapter import PREFIX, FactoredModule
from streammerge.planning.plan import MergePlan
from streammerge.planning.schedule import Piece
from streammerge.tensors.encoders.base import Stored
from streammerge.tensors.encoders.low_rank import RANK

_STEP = 1 << 20
"""Bytes compared at a time."""


def recompute_adapter(
    plan: MergePlan,
    out: Path,
    manifest: Mapping[str, Any],
    *,
    sample: int | None,
    seed: int,
    on_tick: Callable[[int], None] = lambda nbytes: None,
) -> Recomputed:
    """Recompute a sample of an adapter's modules and tensors, or all, as `recompute` does for a model."""
    every = pieces_of(plan)
    chosen = every if sample is None else random.Random(seed).sample(every, min(sample, len(every)))
    reader = with_stages(Reader(), plan)
    with tempfile.TemporaryFile() as file:
        draft = _Draft(file.fileno())
        worker = Worker(RunSpec(plan, None, identify(plan, reader)), reader, draft)
        try:
            scheduler = Scheduler(worker, [Unrecorded()], lambda tick: on_tick(tick.bytes_read))
            scheduler.run([Progress({}, all_but(plan, chosen))])
            refs, _, _ = read_header(place_of(out).path(ADAPTER_WEIGHTS))
            problems = tuple(_problems(plan, chosen, draft, refs, reader))
        finally:
            reader.close()
    check_inputs(plan)
    n = sum(job.n_elements for job in plan.jobs)
    return Recomputed(len(chosen), len(every), sum(piece.stop - piece.start for piece in chosen), n, problems)


class _Draft:
    """A file of factors that nobody keeps."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.bytes_written = 0

    def write(self, shard: int, offset: int, data: Bytes) -> None:
        """See `Sink`."""
        view = np.ascontiguousarray(data).data
        while view:
            n = os.pwrite(self._descriptor, view, offset)
            view, offset = view[n:], offset + n
        self.bytes_written += data.size

    def early(self) -> _Draft:
        """See `Sink`: bytes are taken in any order."""
        return self

    def sync(self, shards: set[int]) -> None:
        """See `Sink`."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """Read back bytes."""
        return os.pread(self._descriptor, nbytes, offset)


def _problems(
    plan: MergePlan, chosen: Sequence[Piece], draft: _Draft, refs: Mapping[str, TensorRef], reader: Reader
) -> Iterator[str]:
    """Yield a line for each tensor of the adapter that differs from the draft."""
    assert plan.adapter is not None
    factored = {module.job: module for module in plan.adapter.factored}
    for piece in chosen:
        for stored, offset in _tensors(plan, factored.get(piece.job), piece, draft, refs):
            ref = refs.get(stored.name)
            shown = f"{ADAPTER_WEIGHTS}: tensor {printable(stored.name)}"
            if ref is None or (ref.dtype, ref.shape) != (stored.dtype, stored.shape):
                there = "is missing" if ref is None else f"is {ref.dtype} {list(ref.shape)}"
                yield f"{shown} {there}, recomputed from the inputs {stored.dtype} {list(stored.shape)}"
            elif not _are_equal(ref, offset, draft, reader):
                yield f"{shown}: differs from what is recomputed from the inputs"


def _tensors(
    plan: MergePlan, module: FactoredModule | None, piece: Piece, draft: _Draft, refs: Mapping[str, TensorRef]
) -> Iterator[tuple[Stored, int]]:
    """Yield the tensors of the adapter that come from one piece, with their offsets in the draft."""
    job, slots = plan.jobs[piece.job], plan.layout.slots[piece.job]
    if module is not None:
        (rank,) = np.frombuffer(draft.read(slots[2].offset + 8 * RANK, 8), np.float64)
        for (name, shape), slot in zip(module.factors(int(rank)), slots, strict=False):
            if rank:
                yield Stored(name, job.parts[0].dtype, shape), slot.offset
        return
    assert plan.adapter is not None
    if piece.stop - piece.start == job.n_elements:
        for tensor in (one for saved in plan.adapter.saved for one in saved.tensors):
            if tensor.job == piece.job and PREFIX + tensor.name in refs:  # others are those of the base
                yield Stored(PREFIX + tensor.name, job.dtype, job.shape), slots[0].offset


def _are_equal(ref: TensorRef, offset: int, draft: _Draft, reader: Reader) -> bool:
    for first in range(0, ref.nbytes, _STEP):
        n = min(_STEP, ref.nbytes - first)
        theirs = np.empty(n, np.uint8)
        reader.read_into(ref.path, ref.offset + first, theirs)
        if theirs.tobytes() != draft.read(offset + first, n):
            return False
    return True
