"""The statistic of ties: the position of the last kept one among equal elements, in index order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import BlockMath, Call
from streammerge.algebra.extent import Extent
from streammerge.algebra.scores import Ranked
from streammerge.numerics.ordered_sum import BLOCK
from streammerge.records import dataclass
from streammerge.statistics.base import Known, Measurement, Range, Reducer, Statistic, integers
from streammerge.statistics.ranks import Threshold

_MOST_RUNS = 1 << 14
"""The number of runs whose ties are counted in one pass, and the length of a run that is searched element by element."""


@dataclass(frozen=True)
class TieIndex(Statistic[tuple[int, int]]):
    """The position in index order after which `needed` elements equal to a threshold have occurred.

    Over the whole model the tensors follow in order; the value is an (ordinal, element) pair.
    """

    vector: Ranked
    threshold: Threshold
    extent: Extent = Extent.TENSOR

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of `BlockMath` that it calls."""
        return (Call("ties", self.vector),)

    def placeholder(self) -> tuple[int, int]:
        """Return the start of the first tensor."""
        return (0, 0)

    def reducer(self, over: Measurement) -> Reducer[tuple[int, int]]:
        """Return the reducer that counts ties per run of elements; the value itself if no tie is needed."""
        return TieIndexReducer(self, over.n) if self.threshold.needed else Known((over.tensors[0].ordinal, 0))

    def to_json(self, value: tuple[int, int]) -> object:
        """Return the ordinal and the element."""
        return {"pair": list(value)}

    def from_json(self, plain: Any) -> tuple[int, int]:
        """Return the ordinal and the element."""
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
        Number of elements of all tensors, which determines the length of the runs.
    """

    def __init__(self, statistic: TieIndex, n: int) -> None:
        self.wants: Range | None = None
        self._vector = statistic.vector
        self._key = statistic.threshold.key
        self._left = statistic.threshold.needed
        self._size = -(-n // _MOST_RUNS // BLOCK) * BLOCK
        self._parts: dict[tuple[int, int], NDArray[np.int32]] = {}

    def measured(
        self, ordinal: int, start: int, n: int, math: BlockMath
    ) -> dict[tuple[int, int], NDArray[np.int32]]:
        """Return the ties of one block, per run."""
        return {(ordinal, start): math.ties(self._vector, self._key, self._size).astype(np.int32)}

    def part(self) -> dict[tuple[int, int], NDArray[np.int32]]:
        """Return the ties per run, by ordinal and first element of each block."""
        return self._parts

    def absorb(self, part: dict[tuple[int, int], NDArray[np.int32]]) -> None:
        """Add the blocks of a different reducer."""
        self._parts |= part

    def end(self) -> bool:
        """Choose the run in which the count is reached; finish when a run is a single element."""
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
        raise AssertionError("fewer ties than the threshold's count")

    @property
    def value(self) -> tuple[int, int]:
        """The tensor's ordinal, and its element before which ties are kept."""
        return self._value
