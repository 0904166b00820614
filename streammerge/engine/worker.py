"""Workers, which run chunks in one process, and the run specification that a worker is opened from."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import field
from pathlib import Path
from typing import Any

from streammerge.algebra.block import Block, BlockMath
from streammerge.backends.gpu.lane import Lane
from streammerge.engine.blas import blas_in_one_thread
from streammerge.engine.gram_cache import GramCache, torch_in_one_thread
from streammerge.engine.lent import Lent
from streammerge.io.buffer_pool import Bytes, Pool
from streammerge.io.reader import IoMode, Reader
from streammerge.output.identity import Identity
from streammerge.output.shards import Sink
from streammerge.planning.job import Job
from streammerge.planning.plan import MergePlan
from streammerge.planning.schedule import Chunk, Interval
from streammerge.records import dataclass
from streammerge.timing import Stages

Answers = list[list[Any]]
"""Values of statistics, round by round."""
Knowledge = Mapping[tuple[str, int], Answers]
"""Values of statistics by the name of a stage (empty: the output) and the ordinal of a job."""
PREFETCHERS = 2
"""Number of threads that prefetch later chunks; a request blocks while the disk's queue is full."""


@dataclass(frozen=True)
class RunSpec:
    """Everything that a worker must know about a merge. It pickles, since it has no lock, descriptor or thread."""

    plan: MergePlan
    out: Path | None
    """The output; None if merged tensors go elsewhere; then no worker can open it."""
    identity: Identity
    """The identity of the merge, which provides the keys of random numbers."""
    tolerant: bool = False
    """Whether non-finite values are written and reported; otherwise they are refused."""
    io: IoMode = "direct"
    measures: bool = False
    """Whether statistics are all that is wanted, and nothing is merged."""
    stages: Mapping[str, Identity] = field(default_factory=dict)
    """The values that the result of each stage depends on, by the stage's name."""


class Worker:
    """Runs chunks in one process. All of it may be used from many threads.

    Parameters
    ----------
    spec
        The run specification.
    reader, writer
        Open reader and writer; the caller closes them.
    stop
        Set it to stop after the running pieces.
    """

    is_stage = False
    """Whether its merge is a stage, whose elements are computed within a piece of a later merge."""

    def __init__(
        self, spec: RunSpec, reader: Reader, writer: Sink, stop: threading.Event | None = None
    ) -> None:
        self.spec, self.plan, self.tolerant = spec, spec.plan, spec.tolerant
        self.keys = spec.identity.keys
        self.reader, self.writer = reader, writer
        self.stop = stop or threading.Event()
        self.due = threading.Event()
        """Set it to have what is written made durable now, rather than within a second."""
        self.stages = Stages()
        self.answers: dict[int, Answers] = {}
        """Known values of each job's whole-model and streamed statistics, by ordinal, round by round."""
        self.grams = GramCache()
        """Statistics of Gram matrices, for one tensor at a time."""
        buffers = self.plan.backend.buffers
        self._pool = Pool(self.plan.budget.capacity, buffers.prepare, buffers.release)
        self.threads = ThreadPoolExecutor(self.plan.budget.workers, thread_name_prefix="merge")
        self.prefetchers = ThreadPoolExecutor(PREFETCHERS, thread_name_prefix="prefetch")
        self._held = ExitStack()
        self._lanes = LaneOfWorker(self.plan)
        self.lent = Lent()
        """The elements that the current piece has read, for its stages."""
        self.number = 0
        """The number of its output among `outputs`."""
        self.outputs: tuple[Worker, ...] = (self,)
        """The workers of all outputs that are made from each read; this one, unless it leads several."""
        self.label = ""
        """The name of its output among several, for messages; empty for a single one."""
        self.left: Mapping[int, Sequence[Interval]] = {}
        """What an earlier run left of the tensors that it has begun, by ordinal."""

    @property
    def lane(self) -> Lane:
        """Its GPU, which is opened when the first tensor goes there.

        Raises
        ------
        WorldError
            If the GPU does not start.
        """
        return self._lanes.get()

    @property
    def remarks(self) -> list[str]:
        """What its GPU has to say to the user, once."""
        return self._lanes.remarks

    def share(self, driver: Worker) -> None:
        """Use the threads and buffers of a different worker, and the elements its pieces have read."""
        self.__exit__()
        self.stop, self.stages, self.lent = driver.stop, driver.stages, driver.lent
        self._pool, self.threads, self.prefetchers = driver._pool, driver.threads, driver.prefetchers
        self._lanes = driver._lanes

    def rehearsing(self) -> Worker:
        """Return this worker with a writer that keeps only what is written before other parts; its values are its own."""
        worker = copy(self)
        worker.writer, worker.outputs, worker.answers = self.writer.early(), (worker,), dict(self.answers)
        return worker

    def lead(self, others: Sequence[Worker]) -> None:
        """Make the outputs of other workers too from each read; their plans differ only in the jobs' parameters.

        They use this worker's threads and buffers.
        """
        for number, other in enumerate(others, 1):
            assert other.keys == self.keys, "outputs of one read draw the same random words"
            other.share(self)
            other.number = number
        self.outputs = (self, *others)
        for output in self.outputs if others else ():
            output.label = "" if output.spec.out is None else output.spec.out.name

    def lacking(self, job: int, start: int, stop: int) -> list[Worker]:
        """Return the workers of the outputs that lack some of the elements `start` to `stop` of a job."""
        return [output for output in self.outputs if output._lacks(job, start, stop)]

    def _lacks(self, job: int, start: int, stop: int) -> bool:
        gaps = self.left.get(job)
        return gaps is None or start == stop or any(first < stop and start < last for first, last in gaps)

    def __enter__(self) -> Worker:
        """Start the worker, and limit torch to one thread if its sums depend on the number of threads."""
        self._held.enter_context(torch_in_one_thread(self.plan))
        self._held.enter_context(blas_in_one_thread(self.plan.jobs))
        return self

    def __exit__(self, *exception: object) -> None:
        """Wait for the threads, and free the buffers."""
        self.prefetchers.shutdown(wait=True, cancel_futures=True)
        self.threads.shutdown(wait=True, cancel_futures=True)
        self._lanes.close()
        self._pool.close()
        self._held.close()

    @contextmanager
    def lease(self, nbytes: int) -> Iterator[Bytes | None]:
        """Lend a buffer; None if the merge is stopped."""
        with ExitStack() as held:
            with self.stages.time("wait for memory"):
                buffer = held.enter_context(self._pool.lease(nbytes, self.stop))
            yield buffer

    def known(self, chunk: Chunk) -> Knowledge:
        """Return the values that a worker needs to run a chunk: statistics of its jobs and of their stages."""
        jobs = sorted({piece.job for piece in chunk.pieces})
        own = {(self.plan.name, job): list(self.answers[job]) for job in jobs if job in self.answers}
        computes = self.reader.computes
        return own if computes is None else own | computes.known([self.plan.jobs[job] for job in jobs])

    def learn(self, answers: Knowledge) -> None:
        """Add values of statistics from a different worker."""
        own = {job: rounds for (stage, job), rounds in answers.items() if stage == self.plan.name}
        self.answers.update(own)
        if len(own) < len(answers):
            self.reader.computes.learn(answers)


class LaneOfWorker:
    """The GPU of a worker, opened by the first thread that needs it."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan, self._lock = plan, threading.Lock()
        self._lane: Lane | None = None
        self.remarks: list[str] = []

    def get(self) -> Lane:
        """Return the lane."""
        with self._lock:
            if self._lane is None:
                assert self._plan.backend.open_lane is not None, "planned for a GPU"
                self._lane = self._plan.backend.open_lane(self._plan.device)
                self.remarks = self._lane.remarks
            return self._lane

    def close(self) -> None:
        """Close it, if it was opened."""
        with self._lock:
            if self._lane is not None:
                self._lane.close()
                self._lane = None


@contextmanager
def math_for(worker: Worker, job: Job, loaded: Block) -> Iterator[BlockMath]:
    """Lend the arithmetic of a block when it is this thread's turn on the device."""
    turn = worker.plan.backend_of(job).turn
    with ExitStack() as held:
        if turn is not None:
            with worker.stages.time("wait for the GPU"):
                held.enter_context(turn(worker.plan.device))
        yield math_of(worker, job, loaded)


def math_of(worker: Worker, job: Job, loaded: Block) -> BlockMath:
    """Return the arithmetic of a block from its job's backend."""
    plan = worker.plan
    return plan.backend_of(job).math(loaded, plan.device, plan.work[job.ordinal].extent)
