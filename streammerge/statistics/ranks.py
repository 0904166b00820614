"""Statistics of ranks: the k-th largest magnitude or score, and where ties at it end, by counting bit patterns.

All of it is integers. Where the counting starts affects the number of passes, never the value.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Bins, BlockMath, Call, Counts
from streammerge.algebra.extent import Extent
from streammerge.algebra.scores import Score, sees_rows
from streammerge.algebra.task_vectors import TaskVector
from streammerge.numerics.ordered_sum import BLOCK
from streammerge.statistics.base import (
    MOST_BINS,
    Cost,
    Known,
    Lock,
    Measurement,
    NotFiniteError,
    Range,
    Reducer,
    Statistic,
    integers,
)

_TOP = (1 << 31) - 1
_COARSE = 15
_FEWEST_BINS = 1 << 8
_BIN_BLOCK = 1 << 14
_MOST_RUNS = 1 << 14
"""Runs of elements of which the ties are counted at a time, and elements of a run looked at one by one."""
_INFINITE = 0x7F800000


@dataclass(frozen=True)
class Threshold:
    """The k-th largest magnitude of a task vector and how the elements lie around it."""

    key: int
    """Bit pattern of the fp32 magnitude, sign bit off."""
    ties: int
    """Elements whose magnitude equals it."""
    needed: int
    """How many of the ties belong to the k largest."""


_ABOVE_ALL = Threshold(_INFINITE, 1, 0)
"""The threshold of no elements at all."""


class Rank(Statistic[Threshold]):
    """A statistic that is an element of a given rank."""

    @property
    @abstractmethod
    def ranked(self) -> TaskVector | Score:
        """What is ranked: the magnitudes of a task vector, or scores."""

    @abstractmethod
    def count(self, n: int) -> int:
        """Return its rank of `n` elements in descending order, from 1; 0: above all."""

    @property
    def cost(self) -> Cost:
        """One window; where no sample can be taken, a second pass."""
        return Cost(windows=1, passes=1 + sees_rows(self.ranked))

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of a block that it calls."""
        return (Call("count_keys", self.ranked),)

    def placeholder(self) -> Threshold:
        """Return a threshold without ties."""
        return Threshold(key=0, ties=1, needed=1)

    def reducer(self, over: Measurement) -> Reducer[Threshold] | Known[Threshold]:
        """Return what counts patterns, unless the rank is above all."""
        n = over.n
        return TopKReducer(self, n, over.tolerant, over.most_bins) if self.count(n) else Known(_ABOVE_ALL)

    def to_json(self, value: Threshold) -> object:
        """Return pattern, ties and needed ties."""
        return {"threshold": [value.key, value.ties, value.needed]}

    def from_json(self, plain: Any) -> Threshold:
        """Return the threshold."""
        match plain:
            case {"threshold": [key, ties, needed]}:
                return Threshold(*integers([key, ties, needed]))
        raise ValueError("no threshold")


@dataclass(frozen=True)
class TopK(Rank):
    """Ask for the threshold of the k largest magnitudes of one task vector."""

    vector: TaskVector
    density: float
    plus_one: bool = False
    """k = int(density * n) + 1, as the published TIES code keeps; else int(density * n), at least 1."""
    extent: Extent = Extent.TENSOR

    @property
    def ranked(self) -> TaskVector:
        """The task vector."""
        return self.vector

    @property
    def common(self) -> tuple[object, ...]:
        """The model and its density."""
        return (type(self), self.vector.model, self.density)

    def count(self, n: int) -> int:
        """Return k for `n` elements, at most `n`."""
        return min(n, int(self.density * n) + 1 if self.plus_one else max(1, int(self.density * n)))


@dataclass(frozen=True)
class Band(Rank):
    """Ask for a threshold of a band of magnitudes: `density` of them, below the `gamma` that are the largest.

    Fewer of the largest are left out where both together are more than all.
    """

    vector: TaskVector
    density: float
    gamma: float
    edge: Literal["upper", "lower"]
    """Above the band lie the outliers; above its lower edge these and the band."""
    extent: Extent = Extent.TENSOR

    @property
    def ranked(self) -> TaskVector:
        """The task vector."""
        return self.vector

    @property
    def common(self) -> tuple[object, ...]:
        """The model and its density."""
        return (type(self), self.vector.model, self.density)

    def count(self, n: int) -> int:
        """Return how many of `n` elements lie above the edge."""
        inside = min(n, int(self.density * n))
        outliers = min(int(self.gamma * n), n - inside)
        return outliers + (inside if self.edge == "lower" else 0)


@dataclass(frozen=True)
class Largest(Rank):
    """Ask for the threshold of the k largest scores of a tensor."""

    score: Score
    k: int
    extent: Extent = Extent.TENSOR

    @property
    def ranked(self) -> Score:
        """The score."""
        return self.score

    def count(self, n: int) -> int:
        """Return k for `n` elements, at most `n`."""
        return min(n, self.k)


@dataclass(frozen=True)
class Quantile(Rank):
    """Ask for an order statistic of a tensor's scores: number int(q (n - 1)) of them in ascending order, from 0."""

    score: Score
    q: float
    extent: Extent = Extent.TENSOR

    @property
    def ranked(self) -> Score:
        """The score."""
        return self.score

    def count(self, n: int) -> int:
        """Return its place of `n` in descending order, from 1."""
        return n - int(self.q * (n - 1))


Window = tuple[int, int, int]
"""(lowest pattern, highest pattern, shift)"""


class TopKReducer(Reducer[Threshold]):
    """Finds the k-th largest magnitude by counting bit patterns (METHODS: integer radix selection).

    A pass counts the patterns above a window and, in bins, those inside it. The window narrows to the bin that holds
    rank k until a bin is one pattern. Where it starts, sampled or all patterns, affects the number of passes only: the
    counts prove that rank k lies inside, or the next pass takes all.

    Parameters
    ----------
    n
        Elements that are ranked.
    tolerant
        Whether what is not finite is ranked, above all else, not refused.
    most_bins
        Counts of a window, at most. It too affects the number of passes only.
    """

    def __init__(self, statistic: Rank, n: int, tolerant: bool = False, most_bins: int = MOST_BINS) -> None:
        # More counts than elements only take time.
        self._most_bins = max(_FEWEST_BINS, n) if n < BLOCK else most_bins
        self._tolerant = tolerant
        self._ranked = statistic.ranked
        self._k = statistic.count(n)
        self._n = n
        self._lock = Lock()
        # Blocks tell nothing where an element's rank depends on all of its row.
        self.samples = not sees_rows(self._ranked)
        self._open(0, _TOP)

    def _open(self, low: int, high: int) -> None:
        self._low, self._high, self._shift = low, high, 0
        limit = min(1 << (31 - _COARSE), self._most_bins) if high - low == _TOP else self._most_bins
        while (high - low) >> self._shift >= limit:
            self._shift += 1
        self._above = 0
        self._bins: Counts | Bins | None = None
        self._n_bins = ((high - low) >> self._shift) + 1

    def add(self, ordinal: int, start: int, n: int, math: BlockMath) -> None:
        """Count one block."""
        bins = np.zeros(self._n_bins, np.int32)
        above, highest = math.count_keys(self._ranked, self._low, self._high, self._shift, bins)
        if highest >= _INFINITE and not self._tolerant:
            raise NotFiniteError(ordinal)
        self._count(above, bins)

    def _count(self, above: int, bins: Bins | Counts) -> None:
        with self._lock:
            self._above += above
            if self._bins is None:
                self._bins = bins if self._n < 1 << 31 else bins.astype(np.int64)
            else:
                self._bins += bins

    @property
    def _window(self) -> Window:
        return self._low, self._high, self._shift

    def part(self) -> tuple[Window, int, Counts | Bins | None]:
        """Return the window, the elements above it, and those inside it by bins."""
        return self._window, self._above, self._bins

    def absorb(self, part: tuple[Window, int, Counts | Bins | None]) -> None:
        """Add another's counts, of the same window."""
        window, above, bins = part
        assert window == self._window, "counts of a different pass"
        if bins is not None:
            self._count(above, bins.copy())

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
        self._value = Threshold(low, int(bins[place]), inside - higher)
        self._bins = None
        if low >= _INFINITE:  # more than k are not finite: these stay, all of them, and nothing else does
            self._value = Threshold(_INFINITE - 1, 1, 0)
        return True

    @property
    def sampled_model(self) -> int | None:
        """The one model whose task vector is ranked; None where it takes all of them."""
        return self._ranked.model if isinstance(self._ranked, TaskVector) else None

    def _counted(self) -> Counts | Bins:
        return np.zeros(self._n_bins, np.int64) if self._bins is None else self._bins

    @property
    def value(self) -> Threshold:
        """The threshold."""
        return self._value


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


@dataclass(frozen=True)
class TieIndex(Statistic[tuple[int, int]]):
    """Ask where the first `needed` elements equal to a threshold end, in index order.

    Over the whole model the order is that of the tensors; the value is an (ordinal, element) pair.
    """

    vector: TaskVector | Score
    threshold: Threshold
    extent: Extent = Extent.TENSOR

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of a block that it calls."""
        return (Call("ties", self.vector),)

    def placeholder(self) -> tuple[int, int]:
        """Return the start of the first tensor."""
        return (0, 0)

    def reducer(self, over: Measurement) -> Reducer[tuple[int, int]] | Known[tuple[int, int]]:
        """Return what counts ties by runs of elements, unless none is needed."""
        return TieIndexReducer(self, over.n) if self.threshold.needed else Known((over.tensors[0].ordinal, 0))

    def to_json(self, value: tuple[int, int]) -> object:
        """Return ordinal and element."""
        return {"pair": list(value)}

    def from_json(self, plain: Any) -> tuple[int, int]:
        """Return ordinal and element."""
        match plain:
            case {"pair": [ordinal, element]}:
                ordinal, element = integers([ordinal, element])
                return ordinal, element
        raise ValueError("no element of a tensor")


class TieIndexReducer(Reducer[tuple[int, int]]):
    """Finds the last tie to keep: count ties per run of elements, then search the run that reaches the count.

    Parameters
    ----------
    n
        Elements of all tensors; the more there are, the longer the runs.
    """

    def __init__(self, statistic: TieIndex, n: int) -> None:
        self.wants: Range | None = None
        self._vector = statistic.vector
        self._key = statistic.threshold.key
        self._left = statistic.threshold.needed
        self._size = -(-n // _MOST_RUNS // BLOCK) * BLOCK
        self._parts: dict[tuple[int, int], NDArray[np.int32]] = {}

    def add(self, ordinal: int, start: int, n: int, math: BlockMath) -> None:
        """Count the ties of one block, per run."""
        self._parts[ordinal, start] = math.ties(self._vector, self._key, self._size).astype(np.int32)

    def part(self) -> dict[tuple[int, int], NDArray[np.int32]]:
        """Return the ties per run, by ordinal and first element of each block."""
        return self._parts

    def absorb(self, part: dict[tuple[int, int], NDArray[np.int32]]) -> None:
        """Add another's blocks."""
        self._parts |= part

    def end(self) -> bool:
        """Choose the run in which the count is reached; finish where it is one element."""
        for (ordinal, start), counts in sorted(self._parts.items()):
            if (here := int(counts.sum())) < self._left:
                self._left -= here
                continue
            run = int(np.count_nonzero(np.cumsum(counts) < self._left))
            self._left -= int(counts[:run].sum())
            first = start + run * self._size
            self._parts = {}
            self._value = (ordinal, first + 1)
            self.wants = (ordinal, first, first + self._size)
            done = self._size == 1
            self._size = 1 if self._size <= max(BLOCK, _MOST_RUNS) else BLOCK
            return done
        raise AssertionError("fewer ties than were counted for the threshold")

    @property
    def value(self) -> tuple[int, int]:
        """The tensor's ordinal, and the element of it before which ties are kept."""
        return self._value
