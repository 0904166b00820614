"""Statistics that count elements: non-zero scores, elements that models changed, elected signs."""

from __future__ import annotations

from typing import Any

import numpy as np

from streammerge.algebra.block import BlockMath, Call, Counts
from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import TaskVectorMerge
from streammerge.algebra.scores import Score
from streammerge.algebra.task_vectors import TaskVector
from streammerge.records import dataclass
from streammerge.statistics.base import A, Lock, Measurement, NotFiniteError, Reducer, Statistic, integers

_INFINITE = 0x7F800000


@dataclass(frozen=True)
class NonZero(Statistic[int]):
    """The number of elements of a tensor whose score is above 0."""

    score: Score
    extent: Extent = Extent.TENSOR

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of `BlockMath` that it calls."""
        return (Call("count_keys", self.score),)

    def placeholder(self) -> int:
        """Return one element."""
        return 1

    def reducer(self, over: Measurement) -> Reducer[int]:
        """Return a counter of patterns above the pattern of 0."""
        return _NonZeroReducer(self, over.tolerant)

    def to_json(self, value: int) -> object:
        """Return the number."""
        return value

    def from_json(self, plain: Any) -> int:
        """Return the number."""
        return integers([plain])[0]


class _Total(Reducer[int]):
    """Adds one integer per block."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._total = 0

    @property
    def value(self) -> int:
        """The total."""
        return self._total

    def part(self) -> int:
        """Return the total so far."""
        return self._total

    def absorb(self, part: int) -> None:
        """Add a total."""
        with self._lock:
            self._total += part


class _NonZeroReducer(_Total):
    """Counts elements whose score is above 0."""

    def __init__(self, statistic: NonZero, tolerant: bool) -> None:
        super().__init__()
        self._statistic = statistic
        self._tolerant = tolerant

    def measured(self, ordinal: int, start: int, n: int, math: BlockMath) -> int:
        """Return the count of one block."""
        above, highest = math.count_keys(self._statistic.score, 0, 0, 0, np.zeros(1, np.int32))
        if highest >= _INFINITE and not self._tolerant:
            raise NotFiniteError(ordinal)
        return above


@dataclass(frozen=True)
class Touched:
    """Numbers of elements that each model touched (changed by more than epsilon)."""

    unique: tuple[int, ...]
    """Elements that this model alone touched, per model."""
    shared: tuple[int, ...]
    """Elements that this model and at least one other touched, per model."""


@dataclass(frozen=True)
class Touches(Statistic[Touched]):
    """The number of entries of each task vector that exceed `epsilon` in magnitude, alone and together with others."""

    vectors: tuple[TaskVector, ...]
    epsilon: float
    extent: Extent = Extent.TENSOR

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of `BlockMath` that it calls."""
        return (Call("touches"),)

    def placeholder(self) -> Touched:
        """Return one element per model, touched by that model alone."""
        return Touched((1,) * len(self.vectors), (0,) * len(self.vectors))

    def reducer(self, over: Measurement) -> Reducer[Touched]:
        """Return a counter."""
        return _TouchesReducer(self)

    def to_json(self, value: Touched) -> object:
        """Return both lists of counts."""
        return {"touched": [list(value.unique), list(value.shared)]}

    def from_json(self, plain: Any) -> Touched:
        """Return the counts."""
        match plain:
            case {"touched": [unique, shared]}:
                return Touched(integers(unique), integers(shared))
        raise ValueError("no counts of touched elements")


class CountsReducer(Reducer[A]):
    """Adds up arrays of counts, one per block.

    Parameters
    ----------
    shape
        The shape of the counts.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._lock = Lock()
        self._counts: Counts = np.zeros(shape, np.int64)

    def part(self) -> Counts:
        """Return the counts so far."""
        return self._counts

    def absorb(self, part: Counts) -> None:
        """Add counts."""
        with self._lock:
            self._counts = self._counts + part


class _TouchesReducer(CountsReducer[Touched]):
    """Counts the elements that each model touched, alone and with others."""

    def __init__(self, statistic: Touches) -> None:
        super().__init__((2, len(statistic.vectors)))
        self._statistic = statistic

    def measured(self, ordinal: int, start: int, n: int, math: BlockMath) -> Counts:
        """Return the counts of one block, (2, vectors)."""
        return math.touches(self._statistic.vectors, self._statistic.epsilon)

    @property
    def value(self) -> Touched:
        """The counts."""
        alone, shared = self._counts.tolist()
        return Touched(tuple(alone), tuple(shared))


@dataclass(frozen=True)
class SignTotal(Statistic[int]):
    """The number of elements of the whole model that elect + minus the number that elect -."""

    merge: TaskVectorMerge
    extent: Extent = Extent.MODEL

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of `BlockMath` that it calls."""
        return (Call("sign_total", self.merge),)

    def placeholder(self) -> int:
        """Return a tie."""
        return 0

    def reducer(self, over: Measurement) -> Reducer[int]:
        """Return a counter that applies each tensor's own rule."""
        merges = {tensor.ordinal: self.merge for tensor in over.tensors}
        merges |= {ordinal: version.merge for ordinal, version in over.versions.items()}
        return _SignTotalReducer(merges)

    def to_json(self, value: int) -> object:
        """Return the number."""
        return value

    def from_json(self, plain: Any) -> int:
        """Return the number."""
        return integers([plain])[0]


class _SignTotalReducer(_Total):
    """Counts elements that elect + minus elements that elect -, with each tensor's own rule."""

    def __init__(self, merges: dict[int, TaskVectorMerge]) -> None:
        super().__init__()
        self._merges = merges

    def measured(self, ordinal: int, start: int, n: int, math: BlockMath) -> int:
        """Return one block's total."""
        return math.sign_total(self._merges[ordinal])
