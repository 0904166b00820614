"""Exact answers to a method's statistics, from one pass over the pieces or a few.

Everything that is added up is an integer, or an fp64 partial sum of a fixed 4096-element block folded
in index order, so the answer does not depend on pieces, threads or memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Bins, BlockMath, Counts
from streammerge.algebra.extent import Extent
from streammerge.algebra.scores import sees_rows
from streammerge.algebra.task_vectors import TaskVector
from streammerge.numerics.compiled import is_compiled
from streammerge.numerics.ordered_sum import BLOCK, OrderedSum, in_order
from streammerge.numerics.philox import Key, RandomKeys
from streammerge.numerics.philox import words as random_words
from streammerge.planning.job import Job
from streammerge.statistics.kinds import (
    AbsSum,
    Answer,
    Band,
    ColumnDots,
    ColumnGram,
    Dots,
    FisherSquares,
    Gram,
    Largest,
    LowWords,
    NonZero,
    Quantile,
    SignTotal,
    Squares,
    SquareSums,
    SquareTotal,
    Statistic,
    Threshold,
    TieIndex,
    TopK,
    Touched,
    Touches,
)

_TOP = (1 << 31) - 1
_COARSE = 15
MOST_BINS = 1 << 19
"""Counts of a window of magnitudes: more of them do not make fewer passes."""
FEWEST_BINS = 1 << 12
"""Counts of a window that a plan leaves room for, at least."""
_FEWEST_BINS = 1 << 8
_BIN_BLOCK = 1 << 14
_WORDS_AT_ONCE = 1 << 20
_MOST_RUNS = 1 << 14
"""Runs of elements of which the ties are counted at a time, and elements of a run looked at one by one."""
_INFINITE = 0x7F800000
_ABOVE_ALL = Threshold(_INFINITE, 1, 0)
"""The threshold of no elements at all."""

Range = tuple[int, int, int]
"""(job, start, stop)"""


class NotFiniteError(Exception):
    """A task vector holds a NaN or an infinity; the engine finds out where."""

    def __init__(self, job: int) -> None:
        super().__init__(job)
        self.job = job


class Reducer(Protocol):
    """Collects what a statistic asks for; `add` may be called from many threads."""

    wants: Range | None
    """The only elements the next pass needs; None: all of the scope."""

    def add(self, job: int, start: int, n: int, math: BlockMath) -> None:
        """Take one piece into account."""

    def end(self) -> bool:
        """End a pass; return whether the answer is known."""

    @property
    def answer(self) -> Answer:
        """The answer, once `end` has returned True."""


class TopKReducer:
    """The k-th largest magnitude by counting bit patterns (METHODS: integer radix selection).

    A pass counts the patterns above a window and, in bins, those inside it. The window narrows to the
    bin that holds rank k until a bin is one pattern. Where it starts, sampled or all patterns, affects the
    number of passes only: the counts prove that rank k lies inside, or the next pass takes all.

    Parameters
    ----------
    n
        Elements that are ranked.
    tolerant
        Whether what is not finite is ranked, above all else, not refused.
    most_bins
        Counts of a window, at most. It too affects the number of passes only.
    """

    def __init__(
        self,
        statistic: TopK | Band | Largest | Quantile,
        n: int,
        tolerant: bool = False,
        most_bins: int = MOST_BINS,
    ) -> None:
        self.wants: Range | None = None
        # More counts than elements only take time.
        self._most_bins = max(_FEWEST_BINS, n) if n < BLOCK else most_bins
        self._tolerant = tolerant
        self._ranked = statistic.score if isinstance(statistic, Largest | Quantile) else statistic.vector
        self._k = statistic.count(n)
        self._n = n
        self._lock = threading.Lock()
        self._open(0, _TOP)

    def _open(self, low: int, high: int) -> None:
        self._low, self._high, self._shift = low, high, 0
        limit = min(1 << (31 - _COARSE), self._most_bins) if high - low == _TOP else self._most_bins
        while (high - low) >> self._shift >= limit:
            self._shift += 1
        self._above = 0
        self._bins: Counts | Bins | None = None
        self._n_bins = ((high - low) >> self._shift) + 1

    def add(self, job: int, start: int, n: int, math: BlockMath) -> None:
        """Count one piece."""
        bins = np.zeros(self._n_bins, np.int32)
        above, highest = math.count_keys(self._ranked, self._low, self._high, self._shift, bins)
        if highest >= _INFINITE and not self._tolerant:
            raise NotFiniteError(job)
        with self._lock:
            self._above += above
            if self._bins is None:
                self._bins = bins if self._n < 1 << 31 else bins.astype(np.int64)
            else:
                self._bins += bins

    @property
    def can_be_sampled(self) -> bool:
        """Whether blocks of elements tell something: not where an element's rank depends on all of its row."""
        return not sees_rows(self._ranked)

    def narrow_by_sample(self) -> None:
        """Take what was counted as a sample and start over in a window around its estimate of rank k.

        The window spans six standard errors of the sampled rank to each side.
        """
        bins = self._counted()
        sampled = int(bins.sum()) + self._above
        rank = self._k / self._n * sampled
        error = 6 * (rank * (1 - self._k / self._n)) ** 0.5 + 8
        low_bin, _ = _place_from_top(bins, rank + error)
        high_bin, _ = _place_from_top(bins, max(1.0, rank - error))
        low = self._low + (max(0, low_bin) << self._shift)
        high = min(_TOP, self._low + ((high_bin + 1) << self._shift) - 1)
        self._open(low, high) if low_bin >= 0 and rank > error else self._open(0, _TOP)

    def end(self) -> bool:
        """Narrow the window to the bin that holds rank k, or open it wide if rank k is not inside."""
        inside = self._k - self._above
        bins = self._counted()
        place, higher = _place_from_top(bins, inside) if inside > 0 else (-1, 0)
        if place < 0:
            self._open(0, _TOP)
            return False
        low = self._low + (place << self._shift)
        if self._shift:
            self._open(low, min(self._high, low + (1 << self._shift) - 1))
            return False
        self._answer = Threshold(low, int(bins[place]), inside - higher)
        self._bins = None
        if low >= _INFINITE:  # more than k are not finite: these stay, all of them, and nothing else does
            self._answer = Threshold(_INFINITE - 1, 1, 0)
        return True

    @property
    def model(self) -> int | None:
        """The one model whose task vector is ranked; None where it takes all of them."""
        return self._ranked.model if isinstance(self._ranked, TaskVector) else None

    def _counted(self) -> Counts | Bins:
        return np.zeros(self._n_bins, np.int64) if self._bins is None else self._bins

    @property
    def answer(self) -> Threshold:
        """The threshold."""
        return self._answer


def _place_from_top(bins: Counts | Bins, rank: float) -> tuple[int, int]:
    """Return the highest bin that holds, together with all above it, `rank` elements, and how many those above hold.

    The bin is -1 where all together hold fewer.
    """
    above = 0
    for stop in range(len(bins), 0, -_BIN_BLOCK):
        block = bins[max(0, stop - _BIN_BLOCK) : stop]
        total = int(block.sum())
        if above + total >= rank:
            from_top = above + np.cumsum(block[::-1])
            place = int(np.searchsorted(from_top, rank))
            return stop - 1 - place, int(from_top[place] - block[::-1][place])
        above += total
    return -1, above


class NonZeroReducer:
    """Elements whose score is above 0."""

    def __init__(self, statistic: NonZero, tolerant: bool) -> None:
        self.wants: Range | None = None
        self._statistic = statistic
        self._tolerant = tolerant
        self._lock = threading.Lock()
        self._total = 0

    def add(self, job: int, start: int, n: int, math: BlockMath) -> None:
        """Count one piece."""
        above, highest = math.count_keys(self._statistic.score, 0, 0, 0, np.zeros(1, np.int32))
        if highest >= _INFINITE and not self._tolerant:
            raise NotFiniteError(job)
        with self._lock:
            self._total += above

    def end(self) -> bool:
        """One pass is enough."""
        return True

    @property
    def answer(self) -> int:
        """The count."""
        return self._total


class SumsReducer:
    """Sums over the elements, of one kind or several, from the partial sums of all blocks in index order.

    Of magnitudes, of dot products of all pairs of vectors, or of squares.

    Parameters
    ----------
    tensors
        Job and elements of each tensor of the scope, in order.
    """

    def __init__(self, statistic: AbsSum | Gram | Squares, tensors: Sequence[tuple[int, int]]) -> None:
        self.wants: Range | None = None
        self._statistic = statistic
        self._n = sum(n for _, n in tensors)
        self._sums = OrderedSum(tensors)

    def add(self, job: int, start: int, n: int, math: BlockMath) -> None:
        """Add the partial sums of one piece."""
        self._sums.add(job, start, n, self._partials(math))

    def _partials(self, math: BlockMath) -> NDArray[np.float64]:
        if isinstance(self._statistic, AbsSum):
            return math.abs_sums(self._statistic.vector)[:, None]
        if isinstance(self._statistic, Gram):
            return math.dots(self._statistic.vectors, BLOCK)
        return math.squares(self._statistic.vectors, self._statistic.selection)

    def end(self) -> bool:
        """One pass is enough."""
        return True

    @property
    def answer(self) -> float | Dots | SquareSums:
        """The sum, or the sums."""
        totals = self._sums.totals
        if isinstance(self._statistic, AbsSum):
            return totals[0]
        if isinstance(self._statistic, Gram):
            return Dots(tuple(totals), self._statistic.n)
        return SquareSums(tuple(totals), self._n)


class ColumnGramReducer:
    """The dot products of all pairs of vectors over each column, piece after piece: they must come in order."""

    def __init__(self, statistic: ColumnGram, columns: int) -> None:
        self.wants: Range | None = None
        self._statistic = statistic
        self._sums = np.zeros((statistic.n * (statistic.n + 1) // 2, columns))
        self._next = 0

    def add(self, job: int, start: int, n: int, math: BlockMath) -> None:
        """Add the products of one piece."""
        assert start == self._next, "pieces out of order"
        math.add_column_dots(self._statistic.vectors, self._sums)
        self._next += n

    def end(self) -> bool:
        """One pass is enough."""
        return True

    @property
    def answer(self) -> ColumnDots:
        """The upper triangles of the Gram matrices."""
        return ColumnDots(self._sums, self._statistic.n)


class TouchesReducer:
    """How many elements each model has touched, alone and with others."""

    def __init__(self, statistic: Touches) -> None:
        self.wants: Range | None = None
        self._statistic = statistic
        self._lock = threading.Lock()
        self._counts = np.zeros((2, len(statistic.vectors)), np.int64)

    def add(self, job: int, start: int, n: int, math: BlockMath) -> None:
        """Count one piece."""
        counts = math.touches(self._statistic.vectors, self._statistic.epsilon)
        with self._lock:
            self._counts += counts

    def end(self) -> bool:
        """One pass is enough."""
        return True

    @property
    def answer(self) -> Touched:
        """The counts."""
        alone, shared = self._counts.tolist()
        return Touched(tuple(alone), tuple(shared))


class TieIndexReducer:
    """Where the last tie that is needed lies: ties per run of elements, then looks into the run that holds it.

    Parameters
    ----------
    n
        Elements of the scope; the more there are, the longer the runs.
    """

    def __init__(self, statistic: TieIndex, n: int) -> None:
        self.wants: Range | None = None
        self._vector = statistic.vector
        self._key = statistic.threshold.key
        self._left = statistic.threshold.needed
        self._size = -(-n // _MOST_RUNS // BLOCK) * BLOCK
        self._parts: dict[tuple[int, int], NDArray[np.int32]] = {}

    def add(self, job: int, start: int, n: int, math: BlockMath) -> None:
        """Count the ties of one piece, per run."""
        self._parts[job, start] = math.ties(self._vector, self._key, self._size).astype(np.int32)

    def end(self) -> bool:
        """Choose the run in which the count is reached; finish where it is one element."""
        for (job, start), counts in sorted(self._parts.items()):
            if (here := int(counts.sum())) < self._left:
                self._left -= here
                continue
            run = int(np.count_nonzero(np.cumsum(counts) < self._left))
            self._left -= int(counts[:run].sum())
            first = start + run * self._size
            self._parts = {}
            self._answer = (job, first + 1)
            self.wants = (job, first, first + self._size)
            done = self._size == 1
            self._size = 1 if self._size <= max(BLOCK, _MOST_RUNS) else BLOCK
            return done
        raise AssertionError("fewer ties than were counted for the threshold")

    @property
    def answer(self) -> tuple[int, int]:
        """The job's ordinal, and the element of its tensor before which ties are kept."""
        return self._answer


class SignTotalReducer:
    """Elements that elect + minus elements that elect -, over all jobs, each with its own rule."""

    def __init__(self, statistics: Mapping[int, SignTotal]) -> None:
        self.wants: Range | None = None
        self._statistics = statistics
        self._lock = threading.Lock()
        self._total = 0

    def add(self, job: int, start: int, n: int, math: BlockMath) -> None:
        """Add one piece's total."""
        total = math.sign_total(self._statistics[job].merge)
        with self._lock:
            self._total += total

    def end(self) -> bool:
        """One pass is enough."""
        return True

    @property
    def answer(self) -> int:
        """The total."""
        return self._total


class FisherSquaresReducer:
    """The sum of squares of one model's diagonal: of each tensor by blocks in index order, then over tensors.

    Parameters
    ----------
    recorded
        The sums of tensors that need not be read, by job.
    lengths
        The elements of every tensor that has a diagonal, by job.
    """

    def __init__(self, model: int, recorded: Mapping[int, float], lengths: Mapping[int, int]) -> None:
        self.wants: Range | None = None
        self._model = model
        self._totals = dict(recorded)
        self._lengths = lengths
        self._sums: dict[int, OrderedSum] = {}
        self._read = {job: 0 for job in lengths if job not in recorded}
        self._lock = threading.Lock()

    def add(self, job: int, start: int, n: int, math: BlockMath) -> None:
        """Add the partial sums of one piece."""
        if job not in self._read:
            return
        partials, bad = math.fisher_squares(self._model)
        if bad:
            raise NotFiniteError(job)
        with self._lock:
            sums = self._sums.setdefault(job, OrderedSum([(job, self._lengths[job])]))
        sums.add(job, start, n, partials[:, None])
        with self._lock:
            self._read[job] += n
            if self._read[job] == self._lengths[job]:
                self._totals[job] = self._sums.pop(job).totals[0]

    def end(self) -> bool:
        """One pass is enough."""
        return True

    @property
    def answer(self) -> SquareTotal:
        """The sum, the same whether tensors were read or their sums recorded in a store."""
        totals = np.array([self._totals[job] for job in sorted(self._totals)])
        return SquareTotal(in_order(totals), sum(self._lengths.values()))


class Known:
    """An answer that takes no data."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer


def low_words(statistic: LowWords, n: int, key: Key) -> tuple[int, int]:
    """Return which words drop exactly the asked number of `n` elements; see `LowWords`.

    The words are uniform, so the last one to go lies within a few deviations of its expectation; those in
    a window around it are sorted, the ones below counted. The counts prove that it lies inside, or
    the window grows.
    """
    count = statistic.count(n)
    if count <= 0:
        return 0, 0
    share = count / n
    width = 8.0 * (share * (1.0 - share) / n) ** 0.5 + 8.0 / n
    while True:
        low, high = (int(min(1.0, max(0.0, share + side * width)) * 2**32) for side in (-1, 1))
        room = int(n * min(1.0, 2.0 * width) * 1.5) + 64
        words, elements = np.empty(room, np.int64), np.empty(room, np.int64)
        below, found = _words_between(n, key, low, high, words, elements)
        if below < count <= below + found and found <= room:
            order = np.lexsort((elements[:found], words[:found]))
            last = order[count - below - 1]
            return int(words[last]), int(elements[last]) + 1
        width *= 4.0


def _words_between(
    n: int, key: Key, low: int, high: int, words: NDArray[np.int64], elements: NDArray[np.int64]
) -> tuple[int, int]:
    """Do what the kernel of this name does, with it or with torch."""
    if is_compiled("words"):
        from streammerge.kernels.deltas import words_between

        below, found = words_between(0, n, np.array(key, np.uint32), low, high, words, elements)
        return int(below), int(found)
    below, found = 0, 0
    for start in range(0, n, _WORDS_AT_ONCE):
        drawn = random_words(key, start, min(n, start + _WORDS_AT_ONCE)).numpy()
        below += int(np.count_nonzero(drawn < low))
        inside = np.flatnonzero((drawn >= low) & (drawn <= high))
        kept = inside[: max(0, len(words) - found)]
        words[found : found + kept.size] = drawn[kept]
        elements[found : found + kept.size] = start + kept
        found += inside.size
    return below, found


def make_reducer(
    statistic: Statistic,
    jobs: Sequence[Job],
    by_job: Mapping[int, Statistic],
    keys: RandomKeys,
    tolerant: bool = False,
    most_bins: int = MOST_BINS,
) -> Reducer | Known:
    """Return the reducer of a statistic over some jobs; `by_job` has each job's own version of it.

    Entries that are not finite rank above all others and are left out of sums; unless `tolerant`, a rank over them
    is refused, for the merge will be. A rank counts in windows of `most_bins` at most.
    """
    n = sum(job.n_elements for job in jobs)
    if isinstance(statistic, TopK | Band | Largest | Quantile):
        return TopKReducer(statistic, n, tolerant, most_bins) if statistic.count(n) else Known(_ABOVE_ALL)
    if isinstance(statistic, TieIndex):
        needed = statistic.threshold.needed
        return TieIndexReducer(statistic, n) if needed else Known((jobs[0].ordinal, 0))
    if isinstance(statistic, AbsSum | Gram | Squares):
        return SumsReducer(statistic, [(job.ordinal, job.n_elements) for job in jobs])
    if isinstance(statistic, NonZero):
        return NonZeroReducer(statistic, tolerant)
    if isinstance(statistic, Touches):
        return TouchesReducer(statistic)
    if isinstance(statistic, ColumnGram):
        return ColumnGramReducer(statistic, jobs[0].line_length(Extent.COLUMN))
    if isinstance(statistic, LowWords):
        return Known(low_words(statistic, n, keys.key("dare", statistic.vector.stream, jobs[0].name)))
    if isinstance(statistic, FisherSquares):
        known = {job.ordinal: job.fishers[statistic.model] for job in jobs if job.fishers}
        recorded = {job: total for job, ref in known.items() if (total := ref.square_sum) is not None}
        lengths = {job.ordinal: job.n_elements for job in jobs if job.fishers}
        squares = FisherSquaresReducer(statistic.model, recorded, lengths)
        return squares if len(recorded) < len(known) else Known(squares.answer)
    return SignTotalReducer({job: r for job, r in by_job.items() if isinstance(r, SignTotal)})


def collect(
    reducers: Sequence[Reducer | Known],
    run_pass: Callable[[Sequence[Reducer], Range | None], None],
    run_sample: Callable[[Sequence[TopKReducer]], None] | None,
) -> list[Answer]:
    """Run as many passes as the reducers need and return their answers.

    Parameters
    ----------
    run_pass
        Feeds every piece of the scope (or of the range) to the given reducers.
    run_sample
        Feeds some pieces spread over the scope; None where the scope is too small to sample.
    """
    selections = [a for a in reducers if isinstance(a, TopKReducer) and a.can_be_sampled]
    if run_sample is not None and selections:
        run_sample(selections)
        for selection in selections:
            selection.narrow_by_sample()
    pending = [reducer for reducer in reducers if not isinstance(reducer, Known)]
    while pending:
        everything = [a for a in pending if a.wants is None]
        if everything:
            run_pass(everything, None)
        for reducer in pending:
            if reducer.wants is not None:
                run_pass([reducer], reducer.wants)
        pending = [a for a in pending if not a.end()]
    return [reducer.answer for reducer in reducers]


def one_after_another(reducers: Sequence[Reducer]) -> bool:
    """Return whether any of them must be fed piece after piece."""
    return any(isinstance(reducer, ColumnGramReducer) for reducer in reducers)


def needs_models(reducers: Sequence[Reducer]) -> bool:
    """Return whether any of them looks at the models, not at their Fisher diagonals alone."""
    return not all(isinstance(reducer, FisherSquaresReducer) for reducer in reducers)
