"""The run loop: chunks go to an executor, receipts come back, and durable work is recorded in the journal.

::

    main thread     steps of the plan ──> chunks that are ready ──> executor ──> receipts
    streaming       statistics of tensors too large to hold, in a separate thread ──> more chunks are ready
    syncer          fdatasync the shards touched, then append to the journal
"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import replace
from typing import Any, Protocol

from streammerge.engine.answers import restored
from streammerge.engine.course import Alone, Course
from streammerge.engine.executors.base import Executor, make_executor
from streammerge.engine.ledger import Ledger, done_by_all
from streammerge.engine.streaming import Streamer
from streammerge.engine.worker import Worker
from streammerge.errors import Stopped
from streammerge.output.journal import Progress, Receipt
from streammerge.planning.schedule import PASSES_AHEAD, Chunk, StatisticsPass, Step
from streammerge.records import dataclass

_SYNC_SECONDS = 1.0
_WAIT_SECONDS = 0.25


@dataclass(frozen=True)
class Tick:
    """The progress of a merge."""

    bytes_read: int
    bytes_written: int
    elements_done: int
    tensors_done: int


class Record(Protocol):
    """Records finished work; may be used from many threads."""

    def add(self, receipts: Sequence[Receipt]) -> None:
        """Record finished elements."""

    def add_answers(self, answers: Mapping[str, Any]) -> None:
        """Record the values of streamed statistics, by job."""


class Unrecorded:
    """Records nothing: the record of a run that is never resumed."""

    def add(self, receipts: Sequence[Receipt]) -> None:
        """See `Record`."""

    def add_answers(self, answers: Mapping[str, Any]) -> None:
        """See `Record`."""


class Scheduler:
    """Runs the remaining steps of a plan.

    Parameters
    ----------
    worker
        The worker of this process; its reader and writer are open. It may lead the workers of more outputs.
    records
        Open records for receipts and values of statistics, one for each output.
    on_tick
        Called periodically, from the thread that calls `run`.
    executor
        Runs the chunks; default: the threads of `worker`.
    course
        What is run, and in which order; default: all steps of the plan.
    """

    def __init__(
        self,
        worker: Worker,
        records: Sequence[Record],
        on_tick: Callable[[Tick], None],
        executor: Executor | None = None,
        course: Course | None = None,
    ) -> None:
        self._worker, self._plan = worker, worker.plan
        self._computes = worker.reader.computes
        self._records = records
        self._on_tick = on_tick
        self._executor = executor or make_executor("threads")
        self._course = course or Alone(worker.plan)
        self._streamer = Streamer(worker, [record.add_answers for record in records], self._look)
        self._streaming = ThreadPoolExecutor(1, thread_name_prefix="streaming")
        self._caller = threading.current_thread()
        self._lock = threading.Lock()
        self._unsynced: list[Receipt] = []
        self._finished = threading.Event()
        self._failure: BaseException | None = None
        self._ledgers: list[Ledger] = []
        self._merged: set[int] = set()
        """The tensors that were merged while their statistics were streamed."""
        self._unfinished: Counter[int] = Counter()
        """Number of outputs that lack elements of a tensor, by the ordinal of its job."""

    @property
    def receipts(self) -> list[Receipt]:
        """The receipts of all finished pieces of the first output, including earlier runs'."""
        return self.receipts_of(0)

    def receipts_of(self, output: int) -> list[Receipt]:
        """Return the receipts of all finished pieces of an output, including earlier runs'."""
        return self._ledgers[output].receipts

    def run(self, before: Sequence[Progress]) -> None:
        """Run the steps that earlier runs left; return when everything is durable.

        Parameters
        ----------
        before
            What earlier runs have done for each output.

        Raises
        ------
        StreammergeError
            The first failure of any thread; everything finished before is durable and recorded.
        """
        self._caller = threading.current_thread()
        jobs = self._plan.jobs
        self._ledgers = [Ledger(jobs, progress.receipts) for progress in before]
        for output, ledger, progress in zip(self._worker.outputs, self._ledgers, before, strict=True):
            output.left = ledger.left(jobs)
            self._unfinished.update(job.ordinal for job in jobs if output.left.get(job.ordinal, True))
            _restore_answers(output, progress.answers)
        if self._computes is not None:
            answers = {key: rounds for progress in before for key, rounds in progress.answers.items()}
            self._computes.join(self._worker, self._records[0].add_answers, self._look, answers)
        syncer = threading.Thread(target=self._sync_loop, name="syncer")
        syncer.start()
        try:
            with self._worker:
                try:
                    self._course.begin(self._streamer)
                    self._execute(done_by_all(jobs, self._ledgers))
                except BaseException as error:
                    self._worker.stop.set()
                    if isinstance(error, Stopped) and self._failure is not None:
                        raise self._failure from None
                    raise
                finally:
                    self._streaming.shutdown(wait=True, cancel_futures=True)
        finally:
            self._finished.set()
            self._worker.due.set()
            syncer.join()
        if self._failure is not None:
            raise self._failure

    # --- chunks

    def _execute(self, done: Mapping[int, Sequence[tuple[int, int]]]) -> None:
        chunks = self._ready(self._course.steps(done))
        with closing(self._executor.run(self._worker.spec, chunks, self._worker)) as batches:
            for receipts in batches:
                self._take(receipts)
                self._look()
        if self._worker.stop.is_set():
            raise self._failure or Stopped(signal.SIGTERM)

    def _ready(self, steps: Iterable[Step | None]) -> Iterator[Chunk | None]:
        """Yield the chunks in file order, except that chunks of a streamed tensor wait for its statistics.

        Tensors are streamed while chunks of other tensors run, so that the merge does not wait. None means that all
        remaining chunks are waiting.
        """
        passes: dict[int, Future[list[Receipt]]] = {}
        waiting: list[Chunk] = []
        for step in steps:
            if isinstance(step, StatisticsPass):
                while len(passes) >= PASSES_AHEAD:
                    yield from self._ready_after(waiting, passes, next(iter(passes)))
                passes[step.job] = self._streaming.submit(
                    self._streamer.before,
                    self._plan.jobs[step.job],
                    may_merge=not self._executor.durable,  # else nobody would sync it
                )
                if self._plan.streamed:  # chunks behind it would hold all buffers and wait for its bytes
                    yield from self._ready_after(waiting, passes, step.job)
                continue
            for job in [job for job, one in passes.items() if one.done()]:
                yield from self._ready_after(waiting, passes, job)
            if step is None:
                yield None
            elif (step := self._without_merged(step)) is None:
                continue
            elif any(piece.job in passes for piece in step.pieces):
                waiting.append(step)
            else:
                yield step
        while passes:
            yield from self._ready_after(waiting, passes, next(iter(passes)))

    def _ready_after(
        self, waiting: list[Chunk], passes: dict[int, Future[list[Receipt]]], job: int
    ) -> Iterator[Chunk | None]:
        """Wait for the passes over a tensor to end, then yield the chunks that waited only for them."""
        while not wait([passes[job]], timeout=_WAIT_SECONDS).done:
            yield None
        if receipts := passes.pop(job).result():
            self._merged.add(job)
            self._take(receipts)
        free: list[Chunk] = []
        kept: list[Chunk] = []
        for chunk in filter(None, map(self._without_merged, waiting)):
            (kept if any(piece.job in passes for piece in chunk.pieces) else free).append(chunk)
        waiting[:] = kept
        yield from free

    def _without_merged(self, chunk: Chunk) -> Chunk | None:
        """Return the pieces of a chunk that its tensor's pass has not merged; None if there are none."""
        pieces = tuple(piece for piece in chunk.pieces if piece.job not in self._merged)
        return replace(chunk, pieces=pieces) if pieces else None

    def _take(self, receipts: Sequence[Receipt]) -> None:
        with self._lock:
            self._unsynced += receipts
        for receipt in receipts:
            finished, new = self._ledgers[receipt.output].take(receipt)
            if finished:
                self._worker.outputs[receipt.output].answers.pop(receipt.job, None)
            if new:
                self._unfinished[receipt.job] -= 1
                if not self._unfinished[receipt.job] and self._computes is not None:
                    self._computes.forget(self._plan.jobs[receipt.job])

    def _look(self) -> None:
        """Report progress, and stop the merge if written data cannot be made durable."""
        if self._failure is not None:
            raise self._failure
        if threading.current_thread() is self._caller:
            left = sum(ledger.tensors_left for ledger in self._ledgers)
            self._on_tick(
                Tick(
                    self._worker.reader.bytes_read,
                    sum(output.writer.bytes_written for output in self._worker.outputs),
                    sum(ledger.elements_done for ledger in self._ledgers),
                    len(self._plan.jobs) * len(self._ledgers) - left,
                )
            )

    # --- durability

    def _sync_loop(self) -> None:
        while True:
            self._worker.due.wait(_SYNC_SECONDS)
            self._worker.due.clear()
            last = self._finished.is_set()
            with self._lock:
                batch, self._unsynced = self._unsynced, []
            try:
                for number in sorted({receipt.output for receipt in batch}):
                    own = [receipt for receipt in batch if receipt.output == number]
                    self._sync(self._worker.outputs[number], own)
                    self._records[number].add(own)
                    self._ledgers[number].receipts += own
            except BaseException as error:  # handed to the main thread
                self._failure = error
                self._worker.stop.set()
                return
            if last:
                return

    def _sync(self, output: Worker, receipts: Sequence[Receipt]) -> None:
        if self._executor.durable:
            return
        slots = output.plan.layout.slots
        with self._worker.stages.time("sync"):
            output.writer.sync({slot.shard for receipt in receipts for slot in slots[receipt.job]})


def _restore_answers(output: Worker, answers: Mapping[str, list[list[object]]]) -> None:
    """Give the worker of an output the values of statistics that an earlier run recorded."""
    merged = [job for job in output.plan.jobs if job.kind == "merge"]
    known = {job.ordinal: restored(output, job, answers.get(str(job.ordinal), [])) for job in merged}
    even = len({len(rounds) for rounds in known.values()}) <= 1
    if even or not output.plan.model_rounds():
        output.answers.update({ordinal: rounds for ordinal, rounds in known.items() if rounds})
