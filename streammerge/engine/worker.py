"""A worker: what runs chunks in one process; and the run specification that it is made from."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.algebra.block import Block, BlockMath
from streammerge.engine.gram_cache import GramCache, torch_in_one_thread
from streammerge.io.buffer_pool import Bytes, Pool
from streammerge.io.reader import IoMode, Reader
from streammerge.machine import available_memory, share_out
from streammerge.output.identity import Identity
from streammerge.output.place import place_of
from streammerge.output.shards import ShardWriter, Sink
from streammerge.planning.job import Job
from streammerge.planning.plan import MergePlan
from streammerge.planning.schedule import Chunk
from streammerge.timing import Stages

Answers = list[list[Any]]
"""Values of statistics, round by round."""
PREFETCHERS = 2
"""Threads that ask for the bytes of chunks to come; asking blocks while the disk's queue is full."""


@dataclass(frozen=True)
class RunSpec:
    """Everything that a worker must know of a merge. It pickles: no lock, no descriptor and no thread is in it."""

    plan: MergePlan
    out: Path | None
    """The output; None where merged tensors go elsewhere, and no worker can open it."""
    identity: Identity
    """What the output depends on; a worker takes the keys of its random numbers from it."""
    tolerant: bool = False
    """Non-finite values are written and reported, not refused."""
    io: IoMode = "direct"


class Worker:
    """Runs chunks in one process. Everything in it may be used from many threads.

    Parameters
    ----------
    spec
        What is merged.
    reader, writer
        Open; whoever opened them closes them.
    stop
        Set it to stop after the pieces in hand.
    """

    def __init__(
        self, spec: RunSpec, reader: Reader, writer: Sink, stop: threading.Event | None = None
    ) -> None:
        self.spec, self.plan, self.tolerant = spec, spec.plan, spec.tolerant
        self.keys = spec.identity.keys
        self.reader, self.writer = reader, writer
        self.stop = stop or threading.Event()
        self.stages = Stages()
        self.answers: dict[int, Answers] = {}
        """Values of statistics already known of each job, by ordinal, round by round: whole-model and streamed ones."""
        self.grams = GramCache()
        """Statistics of Gram matrices, of one tensor at a time."""
        buffers = self.plan.backend.buffers
        self._pool = Pool(self.plan.budget.capacity, buffers.prepare, buffers.release)
        self.threads = ThreadPoolExecutor(self.plan.budget.workers, thread_name_prefix="merge")
        self.prefetchers = ThreadPoolExecutor(PREFETCHERS, thread_name_prefix="prefetch")
        self._held = ExitStack()

    def __enter__(self) -> Worker:
        """Begin to work: torch is held to one thread where its sums depend on their number."""
        self._held.enter_context(torch_in_one_thread(self.plan))
        return self

    def __exit__(self, *exception: object) -> None:
        """Wait for the threads, and give the buffers back."""
        self.prefetchers.shutdown(wait=True, cancel_futures=True)
        self.threads.shutdown(wait=True, cancel_futures=True)
        self._pool.close()
        self._held.close()

    @contextmanager
    def lease(self, nbytes: int) -> Iterator[Bytes | None]:
        """Lend a buffer; None where the merge is stopped."""
        with ExitStack() as held:
            with self.stages.time("wait for memory"):
                buffer = held.enter_context(self._pool.lease(nbytes, self.stop))
            yield buffer

    def known(self, chunk: Chunk) -> dict[int, Answers]:
        """Return what must be told to the worker that runs a chunk: the values of its jobs' statistics."""
        jobs = {piece.job for piece in chunk.pieces}
        return {job: list(self.answers[job]) for job in sorted(jobs) if job in self.answers}

    def learn(self, answers: Mapping[int, Answers]) -> None:
        """Take what a different worker knows of statistics."""
        self.answers.update(answers)


@contextmanager
def open_worker(spec: RunSpec) -> Iterator[Worker]:
    """Open a worker of its own in any process that sees the inputs and the output directory.

    The shards must be there: the merge makes them before its first chunk.

    Raises
    ------
    WorldError
        If a shard cannot be opened.
    """
    assert spec.out is not None, "a merge whose tensors stay in memory has no worker elsewhere"
    reader = open_reader(spec.plan, spec.io)
    writer = ShardWriter.attach(place_of(spec.out), spec.plan.layout, direct=spec.io == "direct")
    try:
        with Worker(spec, reader, writer) as worker:
            yield worker
    finally:
        writer.close()
        reader.close()


def open_reader(plan: MergePlan, io: IoMode) -> Reader:
    """Return a reader for the inputs of a plan: it keeps as many files open, and as much cached, as there is room for."""
    inputs = share_out(len(plan.layout.shards), plan.budget.workers + PREFETCHERS)
    return Reader(io, max(0, available_memory() - plan.budget.capacity) // 2, most_open=inputs)


@contextmanager
def math_for(worker: Worker, job: Job, loaded: Block) -> Iterator[BlockMath]:
    """Lend the arithmetic of a block, once it is this thread's turn on the device."""
    turn = worker.plan.backend_of(job).turn
    with ExitStack() as held:
        if turn is not None:
            with worker.stages.time("wait for the GPU"):
                held.enter_context(turn(worker.plan.device))
        yield math_of(worker, job, loaded)


def math_of(worker: Worker, job: Job, loaded: Block) -> BlockMath:
    """Return the arithmetic of a block, by the backend of its job."""
    plan = worker.plan
    return plan.backend_of(job).math(loaded, plan.device, plan.work[job.ordinal].extent)
