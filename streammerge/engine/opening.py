"""Opens a reader of a merge's inputs, and a worker in any process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from streammerge.engine.stages import StageRuns
from streammerge.engine.worker import PREFETCHERS, RunSpec, Worker
from streammerge.io.reader import IoMode, Reader
from streammerge.machine import available_memory, share_out
from streammerge.output.place import place_of
from streammerge.output.shards import ShardWriter
from streammerge.planning.plan import MergePlan


@contextmanager
def open_worker(spec: RunSpec) -> Iterator[Worker]:
    """Open a separate worker in any process that sees the inputs and the output directory.

    The shards must exist: the merge creates them before its first chunk.

    Raises
    ------
    WorldError
        If a shard cannot be opened.
    """
    assert spec.out is not None, "a merge whose tensors stay in memory has no worker elsewhere"
    reader = open_reader(spec.plan, spec.io, tolerant=spec.tolerant)
    if reader.computes is not None:
        reader.computes.adopt(spec.stages)
    writer = ShardWriter.attach(place_of(spec.out), spec.plan.layout, direct=spec.io == "direct")
    try:
        with Worker(spec, reader, writer) as worker:
            yield worker
    finally:
        writer.close()
        reader.close()


def open_reader(plan: MergePlan, io: IoMode, *, tolerant: bool = False, outputs: int = 1) -> Reader:
    """Return a reader for the inputs of a plan. It keeps as many files open, and as much cached, as there is room for.

    It also computes the plan's stages. With `tolerant`, non-finite values pass from one stage to the next. `outputs` is
    the number of outputs that are open at a time.
    """
    shards = len(plan.layout.shards) * outputs + outputs - 1  # each has a journal and a lock as well
    inputs = share_out(shards, plan.budget.workers + PREFETCHERS)
    reader = Reader(io, max(0, available_memory() - plan.budget.capacity) // 2, most_open=inputs)
    return with_stages(reader, plan, tolerant=tolerant)


def with_stages(reader: Reader, plan: MergePlan, *, tolerant: bool = False) -> Reader:
    """Return a reader that computes the stages of a plan as they are read."""
    if plan.stages:
        StageRuns(plan, reader, tolerant=tolerant)
    return reader
