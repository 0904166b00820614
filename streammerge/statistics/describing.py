"""Statistics that describe models, unused by merges: norms, agreeing signs, directions, magnitudes by power of two."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import BlockMath, Call, Counts
from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import TaskVectorMerge
from streammerge.algebra.task_vectors import TaskVector
from streammerge.records import dataclass
from streammerge.statistics.base import Cost, Measurement, NotFiniteError, Reducer, Statistic, integers
from streammerge.statistics.counts import CountsReducer
from streammerge.statistics.sums import SquareSums, SumsOfSquares

_TOP = (1 << 31) - 1
_MANTISSA = 23
"""Bits of an fp32 pattern below its exponent."""
_INFINITE = 0x7F800000
EXPONENTS = 1 << 8
"""Number of bins, one per fp32 exponent: bin e counts magnitudes from 2^(e - 127) to twice that; bin 0 smaller ones."""


@dataclass(frozen=True)
class OwnSquares(SumsOfSquares):
    """The sums of squares of the base, if there is one, and of every model: of weights, not of task vectors."""

    n: int
    """Number of these tensors."""
    extent: Extent = Extent.TENSOR

    @property
    def cost(self) -> Cost:
        """One sum per block for each tensor."""
        return Cost(partials=self.n)

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of `BlockMath` that it calls."""
        return (Call("own_squares"),)

    def placeholder(self) -> SquareSums:
        """Return unit vectors of one element."""
        return SquareSums((1.0,) * self.n, 1)

    def partials(self, math: BlockMath) -> NDArray[np.float64]:
        """Return the sums of squares, (blocks, tensors)."""
        return math.own_squares()


@dataclass(frozen=True)
class SignCounts:
    """The numbers of elements where two or more task vectors are not zero."""

    agree: int
    """Elements where all non-zero task vectors have the same sign."""
    conflict: int
    """Elements where two task vectors differ in sign."""


@dataclass(frozen=True)
class SignAgreement(Statistic[SignCounts]):
    """The numbers of elements at which surviving entries of task vectors agree in sign, and at which they conflict."""

    vectors: tuple[TaskVector, ...]
    extent: Extent = Extent.TENSOR

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of `BlockMath` that it calls."""
        return (Call("agreements"),)

    def placeholder(self) -> SignCounts:
        """Return one element that agrees."""
        return SignCounts(1, 0)

    def reducer(self, over: Measurement) -> Reducer[SignCounts]:
        """Return a counter."""
        return _AgreementReducer(self)

    def to_json(self, value: SignCounts) -> object:
        """Return both counts."""
        return {"signs": [value.agree, value.conflict]}

    def from_json(self, plain: Any) -> SignCounts:
        """Return both counts."""
        match plain:
            case {"signs": [agree, conflict]}:
                return SignCounts(*integers([agree, conflict]))
        raise ValueError("no counts of signs")


class _AgreementReducer(CountsReducer[SignCounts]):
    """Adds the counts of blocks."""

    def __init__(self, statistic: SignAgreement) -> None:
        super().__init__((2,))
        self._vectors = statistic.vectors

    def measured(self, ordinal: int, start: int, n: int, math: BlockMath) -> Counts:
        """Return the counts of one block."""
        return math.agreements(self._vectors)

    @property
    def value(self) -> SignCounts:
        """The counts."""
        return SignCounts(*map(int, self._counts))


@dataclass(frozen=True)
class Directions:
    """The numbers of elements that a task vector raises, lowers and leaves as they are."""

    up: int
    down: int
    still: int


@dataclass(frozen=True)
class Moves(Statistic[Directions]):
    """The directions in which one of some task vectors moves the elements of the base."""

    n: int
    """Number of task vectors in a block."""
    vector: int
    """Index of the one."""
    extent: Extent = Extent.TENSOR

    @property
    def _alone(self) -> TaskVectorMerge:
        """A sum to which the other vectors add nothing; the sign of its total is the vector's."""
        weights = (float(i == self.vector) for i in range(self.n))
        return TaskVectorMerge(
            tuple(TaskVector(i, weight=weight) for i, weight in enumerate(weights)), elect=True
        )

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of `BlockMath` that it calls."""
        return (Call("count_keys", TaskVector(self.vector)), Call("sign_total", self._alone))

    def placeholder(self) -> Directions:
        """Return one element that stays."""
        return Directions(0, 0, 1)

    def reducer(self, over: Measurement) -> Reducer[Directions]:
        """Return a counter."""
        return _MovesReducer(self, self._alone)

    def to_json(self, value: Directions) -> object:
        """Return the counts."""
        return {"moves": [value.up, value.down, value.still]}

    def from_json(self, plain: Any) -> Directions:
        """Return the counts."""
        match plain:
            case {"moves": [up, down, still]}:
                return Directions(*integers([up, down, still]))
        raise ValueError("no counts of moves")


class _MovesReducer(CountsReducer[Directions]):
    """Adds the counts of blocks: a magnitude of 0 stays, and the total of signs is what rises minus what falls."""

    def __init__(self, statistic: Moves, alone: TaskVectorMerge) -> None:
        super().__init__((3,))
        self._vector, self._alone = TaskVector(statistic.vector), alone

    def measured(self, ordinal: int, start: int, n: int, math: BlockMath) -> Counts:
        """Return the counts of one block."""
        zeros = np.zeros(1, np.int32)
        math.count_keys(self._vector, 0, 0, 0, zeros)
        still = int(zeros[0])
        total = math.sign_total(self._alone)
        return np.array([(n - still + total) // 2, (n - still - total) // 2, still], np.int64)

    @property
    def value(self) -> Directions:
        """The counts."""
        return Directions(*map(int, self._counts))


@dataclass(frozen=True)
class Magnitudes(Statistic[tuple[int, ...]]):
    """The number of entries of a task vector with each fp32 exponent, before its cut: `EXPONENTS` counts."""

    vector: TaskVector
    extent: Extent = Extent.TENSOR

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of `BlockMath` that it calls."""
        return (Call("count_keys", self.vector),)

    def placeholder(self) -> tuple[int, ...]:
        """Return one entry of magnitude 1."""
        return tuple(int(exponent == 127) for exponent in range(EXPONENTS))

    def reducer(self, over: Measurement) -> Reducer[tuple[int, ...]]:
        """Return a counter."""
        return _MagnitudesReducer(self, over.tolerant)

    def to_json(self, value: tuple[int, ...]) -> object:
        """Return the counts."""
        return {"exponents": list(value)}

    def from_json(self, plain: Any) -> tuple[int, ...]:
        """Return the counts."""
        match plain:
            case {"exponents": [*counts]} if len(counts) == EXPONENTS:
                return integers(counts)
        raise ValueError("no counts of exponents")


class _MagnitudesReducer(CountsReducer[tuple[int, ...]]):
    """Adds the counts of blocks."""

    def __init__(self, statistic: Magnitudes, tolerant: bool) -> None:
        super().__init__((EXPONENTS,))
        self._vector, self._tolerant = statistic.vector, tolerant

    def measured(self, ordinal: int, start: int, n: int, math: BlockMath) -> Counts:
        """Return the counts of one block."""
        bins = np.zeros(EXPONENTS, np.int32)
        _, highest = math.count_keys(self._vector, 0, _TOP, _MANTISSA, bins)
        if highest >= _INFINITE and not self._tolerant:
            raise NotFiniteError(ordinal)
        return bins.astype(np.int64)

    @property
    def value(self) -> tuple[int, ...]:
        """The counts."""
        return tuple(map(int, self._counts))
