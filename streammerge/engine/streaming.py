"""Statistics of tensors and models that are too large to hold, streamed through a worker pass by pass."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from streammerge.algebra.extent import Extent
from streammerge.engine.answers import follow, plain, reducer_of, resolve_in_memory, sample_starts
from streammerge.engine.in_flight import finished
from streammerge.engine.peaks import Peak, known_peak, largest
from streammerge.engine.task import load, merge_by_tiles, not_finite, prefetch
from streammerge.engine.worker import Worker, math_for
from streammerge.errors import Stopped
from streammerge.io.buffer_pool import Bytes
from streammerge.numerics.ordered_sum import BLOCK
from streammerge.planning.job import Job
from streammerge.planning.schedule import Chunk, Piece, streamed_pieces
from streammerge.statistics.base import NotFiniteError, Range, Reducer, Statistic
from streammerge.statistics.passes import collect

_MODEL_SAMPLE_BLOCKS = 192
_SAMPLE_BLOCKS = 64


class Streamer:
    """Streams tensors through a worker's threads, and gives the values to the worker.

    Parameters
    ----------
    worker
        A running worker, whose threads and buffers are shared with other work.
    note
        Records values by job, in JSON's form, so that an interrupted merge does not stream again.
    on_wait
        Called four times a second, from the thread that waits; an exception that it raises ends the pass.
    """

    def __init__(
        self, worker: Worker, note: Callable[[Mapping[str, Any]], None], on_wait: Callable[[], None]
    ) -> None:
        self._worker, self._plan = worker, worker.plan
        self._note, self._on_wait = note, on_wait

    def model_rounds(self) -> None:
        """Compute every whole-model statistic, round by round, before the merge begins."""
        merged = [job for job in self._plan.jobs if job.kind == "merge"]
        if not merged:
            return
        rounds = self._plan.model_rounds() - self._known_model_rounds(merged[0])
        for job in merged if rounds > 0 else ():
            self.prepare(job)
        for _ in range(rounds):
            wanted = self._wanted_at_model_scope(merged)
            shared = wanted[merged[0].ordinal]
            n = sum(job.n_elements for job in merged)
            reducers = [
                reducer_of(
                    self._worker,
                    statistic,
                    merged,
                    {job: statistics[i] for job, statistics in wanted.items()},
                )
                for i, statistic in enumerate(shared)
            ]

            def run_pass(some: Sequence[Reducer[Any]], only: Range | None) -> None:
                self._stream(merged, some, only)

            def run_sample(some: Sequence[Reducer[Any]], n: int = n) -> None:
                self._drain(self._sample_chunks(merged, some, n, _MODEL_SAMPLE_BLOCKS))

            answers = collect(reducers, run_pass, run_sample)
            for job in merged:
                self._worker.answers.setdefault(job.ordinal, []).append(answers)
            self._record(merged)

    def _known_model_rounds(self, job: Job) -> int:
        known = len(self._worker.answers.get(job.ordinal, []))
        rounds = self._plan.rounds_of(job)[:known]
        return sum(any(statistic.extent == Extent.MODEL for statistic in statistics) for statistics in rounds)

    def _wanted_at_model_scope(self, jobs: Sequence[Job]) -> dict[int, list[Statistic[Any]]]:
        """Advance every job to its next whole-model statistic, computing per-tensor statistics on the way."""
        self.tensor_rounds(jobs)
        result = {}
        for job in jobs:
            wanted = follow(self._worker, job)
            assert isinstance(wanted, list)
            result[job.ordinal] = wanted
        return result

    def tensor_rounds(self, jobs: Sequence[Job], on_job: Callable[[Job], None] | None = None) -> None:
        """Answer the tensor-scope statistics of every job, up to its next whole-model statistic or its rule.

        `on_job` is called from any thread, once for each tensor that is done.
        """

        def bring(job: Job) -> None:
            with self._worker.lease(self._plan.work[job.ordinal].lease_bytes(job.n_elements)) as buffer:
                if buffer is not None:
                    loaded = load(self._worker, job, 0, job.n_elements, buffer, again=True)
                    with (
                        math_for(self._worker, job, loaded) as math,
                        self._worker.stages.time("statistics"),
                    ):
                        self._guarded(
                            job, lambda: resolve_in_memory(self._worker, job, loaded, math, until_model=True)
                        )
                    if on_job is not None:
                        on_job(job)

        def futures() -> Iterable[Future[None]]:
            for job in jobs:
                wanted = follow(self._worker, job)
                if not isinstance(wanted, list) or wanted[0].extent == Extent.MODEL:
                    continue
                self.prepare(job)
                if self._plan.work[job.ordinal].mode == "resident":
                    yield self._worker.threads.submit(bring, job)
                else:
                    self.answer(job)
                    if on_job is not None:
                        on_job(job)

        self._drain(futures())

    def prepare(self, job: Job) -> None:
        """Compute the statistics of the stages that a tensor is made of; this waits for passes over files."""
        if job.waits:
            self._worker.reader.computes.prepare(job)

    def before(self, job: Job) -> None:
        """Compute the values that must be known before the first piece of a tensor is merged."""
        self.prepare(job)
        if self._plan.work[job.ordinal].mode == "streamed":
            self.answer(job)

    def answer(self, job: Job) -> None:
        """Answer the tensor-scope statistics of one tensor by streaming it: it may be too large to hold."""
        self.prepare(job)
        while isinstance(wanted := follow(self._worker, job), list) and wanted[0].extent == Extent.TENSOR:
            reducers = [
                reducer_of(self._worker, statistic, [job], {job.ordinal: statistic}) for statistic in wanted
            ]

            def run_pass(some: Sequence[Reducer[Any]], only: Range | None) -> None:
                self._stream([job], some, only)

            def run_sample(some: Sequence[Reducer[Any]]) -> None:
                self._drain(self._sample_chunks([job], some, job.n_elements, _SAMPLE_BLOCKS))

            answers = collect(reducers, run_pass, run_sample)
            self._worker.answers.setdefault(job.ordinal, []).append(answers)
            self._record([job])
        peak = job.encoder is not None and job.encoder.needs_peak
        if peak and not isinstance(wanted, list) and known_peak(self._worker, job) is None:
            self._find_peak(job)

    def _find_peak(self, job: Job) -> None:
        """Merge a tensor piece by piece, only to find its largest magnitude."""
        found = [0.0]  # many threads append to it, and nothing else

        def look(piece: Piece) -> None:
            if self._worker.stop.is_set() or piece.stop <= piece.start:
                return
            with self._worker.lease(
                self._plan.work[job.ordinal].lease_bytes(piece.stop - piece.start)
            ) as buffer:
                if buffer is not None:
                    merge_by_tiles(self._worker, job, piece, buffer, lambda _, v: found.append(largest(v)))

        pieces = self._pieces(job, 0, job.n_elements)
        self._drain(self._worker.threads.submit(look, piece) for piece in pieces)
        self._worker.answers.setdefault(job.ordinal, []).append([Peak(max(found))])

    def _stream(self, jobs: Sequence[Job], some: Sequence[Reducer[Any]], only: Range | None) -> None:
        if only is None:
            ranges = [(job, 0, job.n_elements) for job in jobs]
        else:
            ranges = [(self._plan.jobs[only[0]], only[1], only[2])]
        pieces = (piece for one in ranges for piece in self._pieces(*one))
        if any(reducer.in_order for reducer in some):
            for piece in pieces:
                self._drain([self._worker.threads.submit(self._add_piece, piece, some)])
            return
        # In order, since the partial sums of a piece wait for those of all earlier pieces.
        self._drain((self._worker.threads.submit(self._add_piece, p, some) for p in pieces), in_order=True)

    def _pieces(self, job: Job, start: int, stop: int) -> Iterator[Piece]:
        plan = self._plan
        return streamed_pieces(
            job, plan.work[job.ordinal], plan.budget, start, stop, plan.statistics_memory.elements
        )

    def _sample_chunks(
        self, jobs: Sequence[Job], some: Sequence[Reducer[Any]], n: int, blocks: int
    ) -> Iterable[Future[None]]:
        """Feed blocks spread evenly over the elements of all jobs."""
        pieces = []
        position = 0
        starts = sample_starts(n, blocks)
        for job in jobs:
            for start in starts:
                local = start - position
                if 0 <= local < job.n_elements:
                    first = local // BLOCK * BLOCK
                    pieces.append(Piece(job.ordinal, first, min(job.n_elements, first + BLOCK)))
            position += job.n_elements
        for piece in pieces:
            self._worker.prefetchers.submit(prefetch, self._worker, Chunk((piece,), 0))
        for piece in pieces:
            yield self._worker.threads.submit(self._add_piece, piece, some)

    def _add_piece(self, piece: Piece, some: Sequence[Reducer[Any]]) -> None:
        if self._worker.stop.is_set() or piece.stop <= piece.start:
            return
        job = self._plan.jobs[piece.job]
        with self._worker.lease(self._plan.work[job.ordinal].lease_bytes(piece.stop - piece.start)) as buffer:
            if buffer is not None:
                self._guarded(job, lambda: self._add_loaded(job, piece, some, buffer))

    def _add_loaded(self, job: Job, piece: Piece, some: Sequence[Reducer[Any]], buffer: Bytes) -> None:
        reads = any(reducer.reads_models for reducer in some)
        if not reads and not job.fishers:
            return
        loaded = load(self._worker, job, piece.start, piece.stop, buffer, models_too=reads, again=True)
        with math_for(self._worker, job, loaded) as math, self._worker.stages.time("statistics"):
            for reducer in some:
                reducer.add(job.ordinal, piece.start, loaded.n, math)

    def _guarded(self, job: Job, action: Callable[[], object]) -> None:
        try:
            action()
        except NotFiniteError:
            raise not_finite(self._worker, job, 0, job.n_elements) from None

    def _record(self, jobs: Sequence[Job]) -> None:
        """Record the values of some jobs in one append, so that a streamed pass is not repeated."""
        self._note({str(job.ordinal): plain(self._worker, job) for job in jobs})

    def _drain(self, futures: Iterable[Future[None]], *, in_order: bool = False) -> None:
        """Wait for pieces, a few in flight, and stop at the first failure."""
        for done in finished(futures, 2 * self._plan.budget.workers, in_order=in_order):
            for future in done:
                future.result()
            self._on_wait()
        # A stopped pass has counted only some pieces, so its counts are useless.
        if self._worker.stop.is_set():
            raise Stopped(signal.SIGTERM)
