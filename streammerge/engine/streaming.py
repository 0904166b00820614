"""Statistics of tensors and models that are too large to hold, streamed through a worker pass by pass."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from streammerge.algebra.extent import Extent
from streammerge.engine.answers import Shared, follow, plain, reducer_of, resolve_in_memory, sample_starts
from streammerge.engine.in_flight import finished
from streammerge.engine.loading import load, prefetch
from streammerge.engine.on_device import add_on_device, answer_on_device
from streammerge.engine.peaks import Peak, known_peak, largest
from streammerge.engine.settling import Settler, settles
from streammerge.engine.task import merge_by_tiles, not_finite
from streammerge.engine.worker import Worker, math_for
from streammerge.errors import Stopped
from streammerge.io.buffer_pool import Bytes
from streammerge.numerics.encoding import Values
from streammerge.numerics.ordered_sum import BLOCK
from streammerge.output.journal import Receipt
from streammerge.planning.job import Job
from streammerge.planning.schedule import Chunk, Piece, streamed_pieces
from streammerge.statistics.base import NotFiniteError, Range, Reducer, Statistic
from streammerge.statistics.passes import collect

Note = Callable[[Mapping[str, Any]], None]
"""Records values of statistics by job, as JSON holds them."""
_MODEL_SAMPLE_BLOCKS = 192
_SAMPLE_BLOCKS = 64


class Streamer:
    """Streams tensors through a worker's threads, and gives the values to the workers of all outputs that ask for them.

    Parameters
    ----------
    worker
        A running worker, whose threads and buffers are shared with other work.
    notes
        Record values by job, in JSON's form, so that an interrupted merge does not stream again; one for each output.
    on_wait
        Called four times a second, from the thread that waits; an exception that it raises ends the pass.
    """

    def __init__(self, worker: Worker, notes: Sequence[Note], on_wait: Callable[[], None]) -> None:
        self._worker, self._plan = worker, worker.plan
        self._notes, self._on_wait = notes, on_wait

    def model_rounds(self) -> None:
        """Compute every whole-model statistic, round by round, before the merge begins."""
        merged = [job for job in self._plan.jobs if job.kind == "merge"]
        if not merged:
            return
        rounds = {output: _model_rounds_left(output, merged[0]) for output in self._worker.outputs}
        for job in merged if any(left > 0 for left in rounds.values()) else ():
            self.prepare(job)
        while (
            most := max(rounds.values())
        ) > 0:  # outputs with more rounds left go first, until all are level
            asking = [output for output, left in rounds.items() if left == most]
            self._model_round(asking, merged)
            rounds |= dict.fromkeys(asking, most - 1)

    def _model_round(self, asking: Sequence[Worker], merged: Sequence[Job]) -> None:
        """Compute the next whole-model statistics of some outputs, each once if several outputs ask for it."""
        self.tensor_rounds(merged, asking)
        wanted = {output: _wanted_at_model_scope(output, merged) for output in asking}
        versions = {
            key: dict(zip((job.ordinal for job in merged), key, strict=True))
            for keys in wanted.values()
            for key in keys
        }
        reducers = [reducer_of(self._worker, key[0], merged, own) for key, own in versions.items()]

        def run_pass(some: Sequence[Reducer[Any]], only: Range | None) -> None:
            self._stream(merged, some, only)

        def run_sample(some: Sequence[Reducer[Any]]) -> None:
            self.sample(merged, some)

        values = dict(zip(versions, collect(reducers, run_pass, run_sample), strict=True))
        for output, keys in wanted.items():
            known = [values[key] for key in keys]
            for job in merged:
                output.answers.setdefault(job.ordinal, []).append(known)
            self._record(output, merged)

    def tensor_rounds(
        self, jobs: Sequence[Job], outputs: Sequence[Worker], on_job: Callable[[Job], None] | None = None
    ) -> None:
        """Answer the tensor-scope statistics of every job, up to its next whole-model statistic or its rule.

        `on_job` is called from any thread, once for each tensor that is done.
        """

        def bring(job: Job) -> None:
            if self._plan.work[job.ordinal].on_device:
                asking = [(output, own) for output, own, _ in _asking(job, outputs)]
                self._guarded(job, partial(answer_on_device, self._worker, job, asking))
                if on_job is not None:
                    on_job(job)
                return
            with self._worker.lease(self._plan.work[job.ordinal].lease_bytes(job.n_elements)) as buffer:
                if buffer is None:
                    return
                loaded, shared = load(self._worker, job, 0, job.n_elements, buffer, again=True), Shared()
                with math_for(self._worker, job, loaded) as math, self._worker.stages.time("statistics"):
                    for output, own, _ in _asking(job, outputs):
                        self._guarded(
                            job,
                            partial(resolve_in_memory, output, own, loaded, math, shared, until_model=True),
                        )
                if on_job is not None:
                    on_job(job)

        def futures() -> Iterable[Future[None]]:
            for job in jobs:
                if not _asking(job, outputs):
                    continue
                self.prepare(job)
                if self._plan.work[job.ordinal].mode == "resident":
                    yield self._worker.threads.submit(bring, job)
                else:
                    self.answer(job, outputs)
                    if on_job is not None:
                        on_job(job)

        self._drain(futures())

    def prepare(self, job: Job) -> None:
        """Compute the statistics of the stages that a tensor is made of; this waits for passes over files."""
        if job.waits:
            self._worker.reader.computes.prepare(job)

    def before(self, job: Job, *, may_merge: bool = False) -> list[Receipt]:
        """Compute the values that must be known before the first piece of a tensor is merged.

        With `may_merge` the tensor is merged in the same pass if the plan says so. Returns the receipts of what is merged:
        all of the tensor, or nothing.
        """
        self.prepare(job)
        if may_merge and settles(self._worker, job):
            settler = Settler(self._worker, job, lambda: self._record(self._worker, [job]), self._on_wait)
            if (receipts := settler.merge()) is not None:
                return receipts
        if self._plan.work[job.ordinal].mode == "streamed":
            self.answer(job, self._worker.lacking(job.ordinal, 0, job.n_elements))
        return []

    def answer(self, job: Job, outputs: Sequence[Worker]) -> None:
        """Answer the tensor-scope statistics of one tensor by streaming it: it may be too large to hold."""
        self.prepare(job)
        known = Shared()
        while asking := _asking(job, outputs):
            fewest = min(len(output.answers.get(job.ordinal, ())) for output, _, _ in asking)
            level = [one for one in asking if len(one[0].answers.get(job.ordinal, ())) == fewest]
            asked = dict.fromkeys(statistic for _, _, wanted in level for statistic in wanted)
            statistics = [statistic for statistic in asked if statistic not in known]
            reducers = [
                reducer_of(self._worker, statistic, [job], {job.ordinal: statistic})
                for statistic in statistics
            ]

            def run_pass(some: Sequence[Reducer[Any]], only: Range | None) -> None:
                self._stream([job], some, only)

            def run_sample(some: Sequence[Reducer[Any]]) -> None:
                self._drain(self._sample_chunks([job], some, job.n_elements, _SAMPLE_BLOCKS))

            known |= zip(statistics, collect(reducers, run_pass, run_sample), strict=True)
            for output, _, wanted in level:
                output.answers.setdefault(job.ordinal, []).append([known[one] for one in wanted])
                self._record(output, [job])
        self._find_peaks(job, outputs)

    def _find_peaks(self, job: Job, outputs: Sequence[Worker]) -> None:
        """Merge a tensor piece by piece, only to find the largest magnitude of each output whose encoder needs it."""
        found: dict[Worker, list[float]] = {  # many threads append to the lists, and nothing else
            output: [0.0]
            for output in outputs
            if (own := output.plan.jobs[job.ordinal]).encoder is not None
            and own.encoder.needs_peak
            and known_peak(output, own) is None
            and not isinstance(follow(output, own), list)
        }
        if not found:
            return

        def look(piece: Piece) -> None:
            if self._worker.stop.is_set() or piece.stop <= piece.start:
                return
            with self._worker.lease(
                self._plan.work[job.ordinal].lease_bytes(piece.stop - piece.start)
            ) as buffer:
                if buffer is None:
                    return
                loaded, shared = load(self._worker, job, piece.start, piece.stop, buffer), Shared()
                for output, peaks in found.items():
                    own = output.plan.jobs[job.ordinal]

                    def take(_: int, values: Values, peaks: list[float] = peaks) -> None:
                        peaks.append(largest(values))

                    merge_by_tiles(output, own, piece, loaded, shared, take)

        pieces = self._pieces(job, 0, job.n_elements)
        self._drain(self._worker.threads.submit(look, piece) for piece in pieces)
        for output, peaks in found.items():
            output.answers.setdefault(job.ordinal, []).append([Peak(max(peaks))])

    def sample(self, jobs: Sequence[Job], some: Sequence[Reducer[Any]]) -> None:
        """Feed a sample of all elements of some jobs to reducers."""
        n = sum(job.n_elements for job in jobs)
        self._drain(self._sample_chunks(jobs, some, n, _MODEL_SAMPLE_BLOCKS))

    def count(self, jobs: Sequence[Job], some: Sequence[Reducer[Any]], only: Range | None = None) -> None:
        """Feed all elements of some jobs, or a range of one, to reducers."""
        self._stream(jobs, some, only)

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
        how = self._plan.work[job.ordinal]
        if how.on_device and piece.stop - piece.start > BLOCK:  # samples are not worth it
            self._guarded(job, partial(add_on_device, self._worker, job, piece, some))
            return
        with self._worker.lease(how.lease_bytes(piece.stop - piece.start)) as buffer:
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

    def _record(self, output: Worker, jobs: Sequence[Job]) -> None:
        """Record an output's values of some jobs in one append, so that a streamed pass is not repeated."""
        own = [output.plan.jobs[job.ordinal] for job in jobs]
        self._notes[output.number]({str(job.ordinal): plain(output, job) for job in own})

    def _drain(self, futures: Iterable[Future[None]], *, in_order: bool = False) -> None:
        """Wait for pieces, a few in flight, and stop at the first failure."""
        for done in finished(futures, 2 * self._plan.budget.workers, in_order=in_order):
            for future in done:
                future.result()
            self._on_wait()
        # A stopped pass has counted only some pieces, so its counts are useless.
        if self._worker.stop.is_set():
            raise Stopped(signal.SIGTERM)


def _asking(job: Job, outputs: Sequence[Worker]) -> list[tuple[Worker, Job, list[Statistic[Any]]]]:
    """Return the outputs that need statistics of this tensor next, each with its own job and the statistics."""
    found = []
    for output in outputs:
        own = output.plan.jobs[job.ordinal]
        wanted = follow(output, own)
        if isinstance(wanted, list) and wanted[0].extent == Extent.TENSOR:
            found.append((output, own, wanted))
    return found


def _model_rounds_left(output: Worker, job: Job) -> int:
    """Return the number of rounds of whole-model statistics that an output has not computed yet."""
    known = len(output.answers.get(job.ordinal, []))
    own = output.plan.jobs[job.ordinal]
    rounds = output.plan.rounds_of(own)[:known]
    done = sum(any(statistic.extent == Extent.MODEL for statistic in statistics) for statistics in rounds)
    return output.plan.model_rounds() - done


def _wanted_at_model_scope(output: Worker, jobs: Sequence[Job]) -> list[tuple[Statistic[Any], ...]]:
    """Return the whole-model statistics that an output needs next, each in the form that it has for every job."""
    wanted = []
    for job in jobs:
        one = follow(output, output.plan.jobs[job.ordinal])
        assert isinstance(one, list)
        wanted.append(one)
    return [tuple(one[i] for one in wanted) for i in range(len(wanted[0]))]
