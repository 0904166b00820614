"""Order statistics of a score over the whole model, found by counting bit patterns as ranks are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streammerge.algebra.block import Bins, BlockMath, Call, Counts
from streammerge.algebra.extent import Extent
from streammerge.algebra.scores import Score
from streammerge.records import dataclass
from streammerge.statistics.base import Cost, Lock, Measurement, Reducer, Statistic, integers
from streammerge.statistics.ranks import INFINITE, TopKReducer, Window


@dataclass(frozen=True)
class Order(Statistic[tuple[int, int]]):
    """An order statistic of a score over the whole model, and the largest score: the patterns of both.

    It is number int(q n) - `below` in ascending order, from 0, and at most the last.
    """

    score: Score
    q: float
    below: int
    extent: Extent = Extent.MODEL

    @property
    def cost(self) -> Cost:
        """One window."""
        return Cost(windows=1, passes=1)

    @property
    def ranked(self) -> Score:
        """The score."""
        return self.score

    @property
    def common(self) -> tuple[object, ...]:
        """The place in the order; each tensor has its own form of the score, since weights may differ."""
        return (type(self), self.q, self.below)

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of `BlockMath` that it calls."""
        return (Call("count_keys", self.score),)

    def count(self, n: int) -> int:
        """Return its rank among `n` in descending order, from 1."""
        return n - min(n - 1, max(0, int(self.q * n) - self.below))

    def placeholder(self) -> tuple[int, int]:
        """Return the patterns of 0.5 and 1."""
        return 0x3F000000, 0x3F800000

    def reducer(self, over: Measurement) -> Reducer[tuple[int, int]]:
        """Return the reducer that counts patterns and keeps the largest."""
        own = {ordinal: one.score for ordinal, one in over.versions.items()}
        return _OrderReducer(TopKReducer(self, over.n, over.tolerant, over.most_bins), own)

    def to_json(self, value: tuple[int, int]) -> object:
        """Return both patterns."""
        return {"order": list(value)}

    def from_json(self, plain: Any) -> tuple[int, int]:
        """Return both patterns."""
        match plain:
            case {"order": [key, top]}:
                key, top = integers([key, top])
                return key, top
        raise ValueError("no order statistic")


class _OrderReducer(Reducer[tuple[int, int]]):
    """Finds an order statistic as `TopKReducer` does, and keeps the largest pattern below infinity.

    Parameters
    ----------
    counts
        Finds the order statistic.
    own
        The form of the score in each tensor, by ordinal.
    """

    def __init__(self, counts: TopKReducer, own: Mapping[int, Score]) -> None:
        self._counts, self._own = counts, own
        self._top = 0
        self._lock = Lock()
        self.samples = counts.samples

    def measured(
        self, ordinal: int, start: int, n: int, math: BlockMath
    ) -> tuple[tuple[Window, int, Bins], int]:
        """Return the counts of one block and its largest pattern."""
        return self._counts.counted(ordinal, self._own[ordinal], math)

    def part(self) -> tuple[tuple[Window, int, Counts | Bins | None], int]:
        """Return the counts so far and the largest pattern."""
        return self._counts.part(), self._top

    def absorb(self, part: tuple[tuple[Window, int, Counts | Bins | None], int]) -> None:
        """Add counts of the same window."""
        counts, top = part
        self._counts.absorb(counts)
        with self._lock:
            self._top = max(self._top, min(top, INFINITE - 1))

    def narrow_by_sample(self) -> None:
        """Narrow the window; the largest pattern of a sample is one of all."""
        self._counts.narrow_by_sample()

    def end(self) -> bool:
        """End a pass."""
        return self._counts.end()

    @property
    def sampled_model(self) -> int | None:
        """The model whose task vector is ranked; None if the score needs all models."""
        return self._counts.sampled_model

    @property
    def value(self) -> tuple[int, int]:
        """Both patterns."""
        return self._counts.value.key, self._top
