"""Rank statistics, found by counting bit patterns: the k-th largest magnitude or score, and the number of its ties.

All arithmetic is on integers. The initial window affects the number of passes, never the value.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, Protocol

import numpy as np

from streammerge.algebra.block import Bins, BlockMath, Call, Counts, SearchingMath
from streammerge.algebra.extent import Extent
from streammerge.algebra.scores import Ranked, Score
from streammerge.algebra.task_vectors import TaskVector
from streammerge.numerics.ordered_sum import BLOCK
from streammerge.records import dataclass
from streammerge.statistics.base import (
    MOST_BINS,
    Cost,
    Known,
    Lock,
    Measurement,
    NotFiniteError,
    Reducer,
    Statistic,
    integers,
)

_TOP = (1 << 31) - 1
_COARSE = 15
_FEWEST_BINS = 1 << 8
_BIN_BLOCK = 1 << 14
INFINITE = 0x7F800000
"""The fp32 pattern of infinity."""


@dataclass(frozen=True)
class Threshold:
    """The k-th largest magnitude of a task vector, and the number of elements tied with it."""

    key: int
    """Bit pattern of the fp32 magnitude (sign bit cleared)."""
    ties: int
    """Number of elements whose magnitude equals the threshold."""
    needed: int
    """Number of ties that belong to the k largest."""


_ABOVE_ALL = Threshold(INFINITE, 1, 0)
"""The threshold that no element reaches."""


class Ranking(Protocol):
    """A statistic that ranks elements."""

    @property
    def ranked(self) -> Ranked:
        """The ranked quantity."""

    def count(self, n: int) -> int:
        """Return the rank among `n` elements in descending order, from 1."""


class Rank(Statistic[Threshold]):
    """A statistic whose value is the element of a given rank."""

    @property
    @abstractmethod
    def ranked(self) -> Ranked:
        """The ranked quantity: a task vector, by magnitude, or a score."""

    @abstractmethod
    def count(self, n: int) -> int:
        """Return the rank among `n` elements in descending order, from 1; 0: above all elements."""

    @property
    def cost(self) -> Cost:
        """One window, and a second pass if no sample can be taken."""
        return Cost(windows=1, passes=1 + self.ranked.sees_rows)

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of `BlockMath` that it calls."""
        return (Call("count_keys", self.ranked),)

    def placeholder(self) -> Threshold:
        """Return a threshold without ties."""
        return Threshold(key=0, ties=1, needed=1)

    def reducer(self, over: Measurement) -> Reducer[Threshold]:
        """Return the reducer that counts patterns; the value itself if the rank is 0."""
        n = over.n
        return TopKReducer(self, n, over.tolerant, over.most_bins) if self.count(n) else Known(_ABOVE_ALL)

    def to_json(self, value: Threshold) -> object:
        """Return the pattern, the ties and the needed ties."""
        return {"threshold": [value.key, value.ties, value.needed]}

    def from_json(self, plain: Any) -> Threshold:
        """Return the threshold."""
        match plain:
            case {"threshold": [key, ties, needed]}:
                return Threshold(*integers([key, ties, needed]))
        raise ValueError("no threshold")


@dataclass(frozen=True)
class TopK(Rank):
    """The threshold of the k largest magnitudes of one task vector."""

    vector: TaskVector
    density: float
    plus_one: bool = False
    """Whether k = int(density * n) + 1, as in the published TIES code; else k = int(density * n), at least 1."""
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
    """A threshold of the band of magnitudes that follows the largest: skip the fraction `gamma`, keep `density`.

    If the two fractions add to more than 1, fewer of the largest are skipped.
    """

    vector: TaskVector
    density: float
    gamma: float
    edge: Literal["upper", "lower"]
    """Whether to return the band's upper edge, with the outliers above it, or its lower edge."""
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
        """Return the number of elements above the edge among `n`."""
        inside = min(n, int(self.density * n))
        outliers = min(int(self.gamma * n), n - inside)
        return outliers + (inside if self.edge == "lower" else 0)


@dataclass(frozen=True)
class Largest(Rank):
    """The threshold of the k largest scores of a tensor."""

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
    """An order statistic of a tensor's scores: number int(q (n - 1)) in ascending order, from 0."""

    score: Score
    q: float
    extent: Extent = Extent.TENSOR

    @property
    def ranked(self) -> Score:
        """The score."""
        return self.score

    def count(self, n: int) -> int:
        """Return its rank among `n` in descending order, from 1."""
        return n - int(self.q * (n - 1))


Window = tuple[int, int, int]
"""(lowest pattern, highest pattern, shift)"""


class TopKReducer(Reducer[Threshold]):
    """Finds the k-th largest magnitude by counting bit patterns (integer radix selection).

    A pass counts the patterns above a window and, in bins, those inside it. The window narrows to the bin that contains
    rank k until a bin is a single pattern. The first window, all patterns or one estimated from a sample, affects only the
    number of passes: the counts prove that rank k lies inside, or else the next pass covers all patterns.

    Parameters
    ----------
    n
        Number of elements ranked.
    tolerant
        Whether non-finite elements are ranked above all others; otherwise they raise.
    most_bins
        The most bins in a window; it affects only the number of passes.
    """

    def __init__(
        self, statistic: Ranking, n: int, tolerant: bool = False, most_bins: int = MOST_BINS
    ) -> None:
        # More bins than elements only cost time.
        self._most_bins = max(_FEWEST_BINS, n) if n < BLOCK else most_bins
        self._tolerant = tolerant
        self._ranked = statistic.ranked
        self._k = statistic.count(n)
        self._n = n
        self._lock = Lock()
        # A sample of blocks tells nothing if an element's score depends on its whole row.
        self.samples = not self._ranked.sees_rows
        self._open(0, _TOP)

    def _open(self, low: int, high: int) -> None:
        self._low, self._high, self._shift = low, high, 0
        limit = min(1 << (31 - _COARSE), self._most_bins) if high - low == _TOP else self._most_bins
        while (high - low) >> self._shift >= limit:
            self._shift += 1
        self._above = 0
        self._bins: Counts | Bins | None = None
        self._n_bins = ((high - low) >> self._shift) + 1

    def narrow_to(self, low: int, high: int) -> bool:
        """Open the window from one pattern to a higher one; return whether each pattern has its own bin."""
        self._open(low, high)
        return self._shift == 0

    def measured(self, ordinal: int, start: int, n: int, math: BlockMath) -> tuple[Window, int, Bins]:
        """Return the counts of one block; a search of all elements at once ends in a window of one pattern."""
        vector = self._ranked
        whole = n == self._n and isinstance(vector, TaskVector) and vector.rank_drop is None
        if not whole or not isinstance(math, SearchingMath):
            return self.counted(ordinal, vector, math)[0]
        assert isinstance(vector, TaskVector)
        (found,) = math.largest([vector], [self._k])
        self._refuse(ordinal, found.highest)
        self._open(found.key, found.key)
        return self.window, self._k - found.needed, np.array([found.ties], np.int32)

    def counted(self, ordinal: int, ranked: Ranked, math: BlockMath) -> tuple[tuple[Window, int, Bins], int]:
        """Return the counts of one block, and its largest pattern."""
        bins = np.zeros(self._n_bins, np.int32)
        above, highest = math.count_keys(ranked, self._low, self._high, self._shift, bins)
        self._refuse(ordinal, highest)
        return (self.window, above, bins), highest

    def _refuse(self, ordinal: int, highest: int) -> None:
        if highest >= INFINITE and not self._tolerant:
            raise NotFiniteError(ordinal)

    @property
    def window(self) -> Window:
        """The window of this pass."""
        return self._low, self._high, self._shift

    def part(self) -> tuple[Window, int, Counts | Bins | None]:
        """Return the window, the number of elements above it, and the bins inside it."""
        return self.window, self._above, self._bins

    def absorb(self, part: tuple[Window, int, Counts | Bins | None]) -> None:
        """Add counts of the same window."""
        window, above, bins = part
        assert window == self.window, "counts of a different pass"
        with self._lock:
            self._above += above
            if self._bins is None or bins is None:
                self._bins = bins if self._bins is None else self._bins
                return
            if self._n >= 1 << 31:  # one block counts in 32 bits, all of them may not
                self._bins = self._bins.astype(np.int64, copy=False)
            self._bins += bins

    def narrow_by_sample(self) -> None:
        """Treat the counts so far as a sample, and start over with a window around its estimate of rank k.

        The window extends six standard errors of the sampled rank to each side.
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
        """Narrow the window to the bin that contains rank k, or open it to all patterns if rank k is not inside."""
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
        if low >= INFINITE:  # more than k elements are not finite: exactly these are kept
            self._value = Threshold(INFINITE - 1, 1, 0)
        return True

    @property
    def sampled_model(self) -> int | None:
        """The model whose task vector is ranked; None if the score needs all models."""
        return self._ranked.only_model

    def _counted(self) -> Counts | Bins:
        return np.zeros(self._n_bins, np.int64) if self._bins is None else self._bins

    @property
    def value(self) -> Threshold:
        """The threshold."""
        return self._value


def _place_from_top(bins: Counts | Bins, rank: float) -> tuple[int, int]:
    """Return the highest bin such that it and all higher bins hold at least `rank` elements, and the count above it.

    The bin is -1 if all bins together hold fewer.
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
