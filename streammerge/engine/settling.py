"""Merge a tensor that is too large to hold in one read: count its thresholds, and settle what they decide afterwards.

::

    sample ──> brackets ──> every piece: read, count, merge what is decided, put the rest aside ──> thresholds
                                                                        settle the rest, write <──┘

Until the thresholds are known nothing is written, so no receipt is ever for an element that is not settled. See
`streammerge.planning.settling` for the memory, and `streammerge.algebra.brackets` for what is decided.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from queue import SimpleQueue
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Applied, Block, Operand, SettlingMath
from streammerge.algebra.brackets import Edge, lies_between, same_cuts_aside
from streammerge.algebra.rules import TaskVectorMerge
from streammerge.algebra.task_vectors import TaskVector
from streammerge.dtypes import itemsize
from streammerge.engine.answers import follow, reducer_of, sample_starts
from streammerge.engine.aside import Aside, Undecided
from streammerge.engine.in_flight import finished
from streammerge.engine.loading import load
from streammerge.engine.task import not_finite, place_output
from streammerge.engine.worker import Answers, Worker, math_for
from streammerge.errors import Stopped
from streammerge.io.buffer_pool import Bytes
from streammerge.io.pages import PAGE
from streammerge.numerics.crc32 import crc32
from streammerge.numerics.finite import tally
from streammerge.numerics.ordered_sum import BLOCK
from streammerge.output.journal import Receipt
from streammerge.planning.job import Job
from streammerge.planning.needs import tensor_context_of
from streammerge.planning.schedule import Piece
from streammerge.planning.settling import MOST_OF_PIECE, Room, edges_of, room_of
from streammerge.statistics.base import NotFiniteError, Statistic
from streammerge.statistics.brackets import ROOM, bracket, end_of_ties
from streammerge.statistics.ranks import INFINITE, Rank, Threshold, TopKReducer

T = TypeVar("T")
_MOST_RUNS = 256
"""Runs of 4096 elements in a sample."""
_LEAST_SAMPLE = 1 << 20
"""Bytes for the patterns of a sample; larger tensors hold them where their results come later."""
_SETTLED_AT_ONCE = 1 << 16
"""Undecided elements that are settled at a time."""


def settles(worker: Worker, job: Job) -> bool:
    """Return whether a tensor may be merged in one pass now: nothing of it is done, and nothing of it is known."""
    alone = len(worker.outputs) == 1 and not worker.tolerant
    begun = job.ordinal in worker.left or job.ordinal in worker.answers
    return worker.plan.work[job.ordinal].settles and alone and not begun


class Settler:
    """Merges one tensor in one pass.

    Parameters
    ----------
    record
        Called when the thresholds are known and kept among the worker's answers, before anything is written.
    on_wait
        Called four times a second; an exception that it raises ends the merge.
    """

    def __init__(
        self, worker: Worker, job: Job, record: Callable[[], None], on_wait: Callable[[], None]
    ) -> None:
        self._worker, self._job = worker, job
        self._record, self._on_wait = record, on_wait
        plan = worker.plan
        room, found = (
            room_of(job, plan.work[job.ordinal], plan.budget),
            edges_of(plan.method, tensor_context_of(job), job.parameters),
        )
        assert room is not None
        assert found is not None
        self._room: Room = room
        self._edges, self._statistics, self._by_index = found
        self._undecided: dict[int, Undecided] = {}
        self._tied: dict[tuple[int, int], tuple[int, int]] = {}
        """Number of elements with the lower and with the higher pattern, by statistic and piece."""
        self._too_many = False
        """Whether more elements are undecided than there is room for: then the pass only counts."""

    def merge(self) -> list[Receipt] | None:
        """Merge and write the tensor; return its receipts.

        None: it must be read once more, since the brackets did not hold. The thresholds are then known, if the sample was
        not misleading; nothing is written.

        Raises
        ------
        ModelError
            If a value is not finite; WorldError if reading or writing fails.
        Stopped
            If the merge is stopped.
        """
        with self._worker.lease(self._room.nbytes) as buffer:
            if buffer is None:
                raise Stopped(signal.SIGTERM)
            self._divide(buffer)
            threads = ThreadPoolExecutor(self._room.slots, thread_name_prefix="settle")
            try:
                return self._merge(threads)
            except NotFiniteError:
                raise not_finite(self._worker, self._job, 0, self._job.n_elements) from None
            finally:
                threads.shutdown(wait=True, cancel_futures=True)

    def _merge(self, threads: ThreadPoolExecutor) -> list[Receipt] | None:
        self._reducers = [
            reducer_of(self._worker, one, [self._job], {self._job.ordinal: one}) for one in self._statistics
        ]
        brackets = self._brackets(threads)
        if brackets is None:
            return None
        low, high = brackets
        self._low, self._high = self._ruled(low), self._ruled(high)
        for reducer, under, over in zip(self._reducers, low[0], high[0], strict=True):
            if isinstance(reducer, TopKReducer) and not reducer.narrow_to(under.key, over.key):
                return None
        self._drain(threads, self._look, self._pieces())
        ended = [reducer.known or reducer.end() for reducer in self._reducers]
        if not all(ended):
            return None
        rule = self._learn([reducer.value for reducer in self._reducers])
        if rule is None or not self._holds(rule):
            return None
        settled = self._drain(threads, lambda piece: self._settle(piece, rule), self._pieces())
        return [receipt for receipt in settled if receipt is not None]

    def _learn(self, thresholds: list[Any]) -> TaskVectorMerge | None:
        """Record the values of statistics, and return the rule; None if some are still unknown, or too much is undecided."""
        values: Answers = [thresholds]
        if self._by_index and not self._too_many:
            ends = [self._end_of(i, one) for i, one in enumerate(thresholds)]
            values += [] if None in ends else [ends]
        self._worker.answers.setdefault(self._job.ordinal, []).extend(values)
        self._record()
        return None if self._too_many or len(values) < 1 + self._by_index else self._ruled(values)

    def _end_of(self, statistic: int, threshold: Threshold) -> tuple[int, int] | None:
        """Return the place after the last tie that is kept, as `TieIndex` does; None if that tie is not undecided."""
        job, left, model = self._job, threshold.needed, self._model_of(statistic)
        if not left:
            return job.ordinal, 0
        low, high = (
            next(e.cut_of(rule).key for e in self._edges if e.statistic == statistic)
            for rule in (self._low, self._high)
        )
        for piece in self._pieces():
            undecided = self._undecided[piece.start]
            found = sum(places.size for places in undecided.tied(model, threshold.key))
            at_low, at_high = self._tied[statistic, piece.start]
            here = {low: at_low, high: at_high}.get(threshold.key, found)
            if here >= left:
                tied = (place for places in undecided.tied(model, threshold.key) for place in places)
                last = next(islice(tied, left - 1, None)) if found == here else None
                return None if last is None else (job.ordinal, piece.start + int(last) + 1)
            left -= here
        return None

    def _holds(self, rule: TaskVectorMerge) -> bool:
        """Return whether the rule is between the two that decided elements are merged by."""
        return same_cuts_aside(rule, self._high) and all(
            lies_between(edge.cut_of(self._low), edge.cut_of(rule), edge.cut_of(self._high))
            for edge in self._edges
        )

    def _ruled(self, values: Answers) -> TaskVectorMerge:
        rule = follow(self._worker, self._job, values)
        assert isinstance(rule, TaskVectorMerge)
        return rule

    # --- memory and threads

    def _divide(self, buffer: Bytes) -> None:
        """Divide the lease; see `Room`."""
        room, slot = self._room, self._worker.plan.layout.slots[self._job.ordinal][0]
        shift = slot.offset % PAGE
        self._results = buffer[shift : shift + self._job.n_elements * itemsize(self._job.dtype)]
        unused = room.results + room.aside  # until the pass begins
        small = unused < _LEAST_SAMPLE
        self._for_sample = np.empty(_LEAST_SAMPLE, np.uint8) if small else buffer[:unused]
        self._aside = Aside(self._job, buffer[room.results : room.results + room.aside])
        self._slots: SimpleQueue[Bytes] = SimpleQueue()
        first = room.results + room.aside
        self._all_slots = buffer[first : first + room.slots * room.slot]
        for begins in range(first, first + room.slots * room.slot, room.slot):
            self._slots.put(buffer[begins : begins + room.slot])

    @contextmanager
    def _slot(self) -> Iterator[Bytes]:
        slot = self._slots.get()
        try:
            yield slot
        finally:
            self._slots.put(slot)

    def _pieces(self) -> Iterator[Piece]:
        n, size = self._job.n_elements, self._room.piece
        for first in range(0, n, size):
            yield Piece(self._job.ordinal, first, min(n, first + size))

    def _drain(
        self, threads: ThreadPoolExecutor, action: Callable[[Piece], T], pieces: Iterable[Piece]
    ) -> list[T]:
        """Run an action on every piece, a few at a time; return the results in any order."""
        stop, results = self._worker.stop, []

        def run(piece: Piece) -> T | None:
            return None if stop.is_set() else action(piece)

        futures: Iterator[Future[T | None]] = (threads.submit(run, piece) for piece in pieces)
        for done in finished(futures, self._room.slots + 1):
            results += [cast(T, future.result()) for future in done]
            self._on_wait()
        if stop.is_set():
            raise Stopped(signal.SIGTERM)
        return results

    # --- before the pass

    def _brackets(self, threads: ThreadPoolExecutor) -> tuple[Answers, Answers] | None:
        """Return what the method is told for its lower and for its higher rule, from a sample of the tensor.

        None: there is no room for one run of each model, as with a hundred models and a small tensor.
        """
        job, vectors = self._job, list(dict.fromkeys(edge.vector for edge in self._edges))
        length = min(BLOCK, self._room.piece, job.n_elements)
        room = self._for_sample.view(np.uint32)
        idle = self._all_slots  # once the sample is taken
        fitting = min(
            room.size // (length * len(vectors)), idle.size // (ROOM * length), job.n_elements // length
        )
        if not fitting:
            return None
        starts = sample_starts(job.n_elements, min(_MOST_RUNS, fitting))
        starts = [start for start in starts if start + length <= job.n_elements] or [0]
        shape = len(vectors), len(starts), length
        keys = room[: int(np.prod(shape))].reshape(shape)

        def take(piece: Piece) -> None:
            with self._slot() as slot:
                loaded = load(self._worker, job, piece.start, piece.stop, slot)
                with math_for(self._worker, job, loaded) as math:
                    for i, vector in enumerate(vectors):
                        whole = cast(
                            TaskVector, cast(Rank, self._statistics[self._statistic_of(vector)]).ranked
                        )
                        keys[i, starts.index(piece.start)] = cast(SettlingMath, math).patterns(whole)

        self._drain(threads, take, (Piece(job.ordinal, start, start + length) for start in starts))
        low: Answers = [[], []]
        high: Answers = [[], []]
        for i, statistic in enumerate(self._statistics):
            reducer, own = self._reducers[i], keys[vectors.index(self._model_of(i))]
            share = _share(statistic, job)
            pair = (reducer.value, reducer.value) if reducer.known else bracket(own, share, idle)
            low[0].append(pair[0])
            high[0].append(pair[1])
            for one, side, late in ((low, pair[0], True), (high, pair[1], False)):
                end = end_of_ties(own, starts, side, late=late)
                one[1].append((job.ordinal, self._between_pieces(end, late=late)))
        return (low, high) if self._by_index else (low[:1], high[:1])

    def _between_pieces(self, place: float, *, late: bool) -> int:
        """Return a place between two pieces, no later (or earlier) than `place`: the ties of a piece are treated alike."""
        size, n = self._room.piece, self._job.n_elements
        return n if place >= n else int(-(-place // size) if late else place // size) * size

    def _model_of(self, statistic: int) -> int:
        return next(edge.vector for edge in self._edges if edge.statistic == statistic)

    def _statistic_of(self, vector: int) -> int:
        return next(edge.statistic for edge in self._edges if edge.vector == vector)

    # --- the pass

    def _look(self, piece: Piece) -> None:
        """Read a piece, count what lies in the brackets, merge it, and put undecided elements aside."""
        worker, job, n = self._worker, self._job, piece.stop - piece.start
        with self._slot() as slot:
            loaded = load(worker, job, piece.start, piece.stop, slot)
            marks = slot[slot.size - n :]
            marks[:] = 0
            with math_for(worker, job, loaded) as math:
                with worker.stages.time("statistics"):
                    for edge in self._edges:
                        self._count(edge, piece, cast(SettlingMath, math), marks)
                if self._too_many:
                    return
                # The marks of a piece without room are not searched: their places would take memory.
                marked = marks.view(np.bool_)  # numpy searches these faster
                crowded = np.count_nonzero(marked) * MOST_OF_PIECE > n + BLOCK
                undecided = None if crowded else self._aside.put(loaded, np.flatnonzero(marked))
                if undecided is None:
                    self._too_many = True
                    return
                out = place_output(job, loaded, (loaded.base or loaded.models[0]).offset)
                with worker.stages.time("compute"):
                    undecided.trial = math.apply(self._high, out)
                    data = loaded.buffer[out.offset : out.offset + n * itemsize(job.dtype)]
                    self._result_of(piece)[:] = data
        self._undecided[piece.start] = undecided

    def _result_of(self, piece: Piece) -> Bytes:
        width = itemsize(self._job.dtype)
        return self._results[piece.start * width : piece.stop * width]

    def _count(self, edge: Edge, piece: Piece, math: SettlingMath, marks: NDArray[np.uint8]) -> None:
        reducer = self._reducers[edge.statistic]
        if not isinstance(reducer, TopKReducer):  # known without data
            return
        low, high = edge.cut_of(self._low), edge.cut_of(self._high)
        bins = np.zeros(high.key - low.key + 1, np.int32)
        vector = self._high.vectors[edge.vector]
        above, highest = math.mark_undecided(vector, low, high, bins, marks)
        if highest >= INFINITE:
            raise NotFiniteError(self._job.ordinal)
        self._tied[edge.statistic, piece.start] = int(bins[0]), int(bins[-1])
        reducer.absorb((reducer.window, above, bins))

    # --- after the pass

    def _settle(self, piece: Piece, rule: TaskVectorMerge) -> Receipt:
        """Merge the undecided elements of a piece, and write it."""
        worker, job, undecided = self._worker, self._job, self._undecided.pop(piece.start)
        data, kept, bad = self._result_of(piece), undecided.trial.kept, undecided.trial.not_finite
        with self._slot() as slot:
            for first in range(0, undecided.places.size, _SETTLED_AT_ONCE):
                last = min(undecided.places.size, first + _SETTLED_AT_ONCE)
                with worker.stages.time("compute"):
                    more = self._settle_some(piece, undecided, first, last, rule, slot)
                kept = tuple(a + b for a, b in zip(kept, more.kept, strict=True))
                bad += more.not_finite
        if bad and tally(data, job.dtype).count:
            raise not_finite(worker, job, piece.start, piece.stop, data)
        place = worker.plan.layout.slots[job.ordinal][0]
        with worker.stages.time("write"):
            worker.writer.write(place.shard, place.offset + job.spans(piece.start, piece.stop)[0][0], data)
        with worker.stages.time("checksum"):
            checksum = crc32(data)
        return Receipt(job.ordinal, piece.start, piece.stop, (checksum,), kept, 0, 0, output=worker.number)

    def _settle_some(
        self, piece: Piece, undecided: Undecided, first: int, last: int, rule: TaskVectorMerge, slot: Bytes
    ) -> Applied:
        """Settle some undecided elements, in fp32, and put them in their places; return what more survives."""
        job, n = self._job, last - first
        step = -(-4 * n // 8) * 8
        for number, values in enumerate(undecided.inputs(first, last)):
            slot[number * step : number * step + 4 * n].view(np.float32)[:] = values
        operands = [Operand(number * step, "F32") for number in range(len(job.inputs))]
        out = Operand(len(operands) * step, job.dtype)
        block = Block(
            slot[: slot.size // 8 * 8],
            tuple(operands[1:]),
            operands[0],
            job.name,
            0,
            n,
            (n,),
            self._worker.keys,
        )
        places = undecided.places[first:last].astype(np.int64)
        with math_for(self._worker, job, block) as math:
            applied = cast(SettlingMath, math).settle(self._high, rule, places + piece.start, out)
        width = itemsize(job.dtype)
        words = np.uint16 if width == 2 else np.uint32
        self._result_of(piece).view(words)[places] = slot[out.offset : out.offset + n * width].view(words)
        return applied


def _share(statistic: Statistic[Any], job: Job) -> float:
    """Return the fraction of a tensor's elements above a threshold."""
    return cast(Rank, statistic).count(job.n_elements) / job.n_elements
