"""What a method may ask about its inputs before it is applied, each answered exactly.

A method that needs statistics is a generator: it yields a list of statistics, is sent the list of
answers, and returns its rule. How a statistic is answered (in RAM, streamed, for one tensor or over
the whole model) is the engine's concern; the answer is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.extent import Extent
from streammerge.algebra.gram_matrix import full_matrices
from streammerge.algebra.rules import Mixers, TaskVectorMerge
from streammerge.algebra.scores import Score, Selection, sees_rows
from streammerge.algebra.task_vectors import TaskVector


@dataclass(frozen=True)
class Threshold:
    """The k-th largest magnitude of a task vector and how the elements lie around it."""

    key: int
    """Bit pattern of the fp32 magnitude, sign bit off."""
    ties: int
    """Elements whose magnitude equals it."""
    needed: int
    """How many of the ties belong to the k largest."""


@dataclass(frozen=True)
class TopK:
    """Ask for the threshold of the k largest magnitudes of one task vector."""

    vector: TaskVector
    density: float
    plus_one: bool = False
    """k = int(density * n) + 1, as the published TIES code keeps; else int(density * n), at least 1."""
    extent: Extent = Extent.TENSOR

    def count(self, n: int) -> int:
        """Return k for `n` elements, at most `n`."""
        return min(n, int(self.density * n) + 1 if self.plus_one else max(1, int(self.density * n)))

    def placeholder(self) -> Threshold:
        """Return an answer of the right type, to follow a method without data."""
        return Threshold(key=0, ties=1, needed=1)


@dataclass(frozen=True)
class Band:
    """Ask for a threshold of a band of magnitudes: `density` of them, below the `gamma` that are the largest.

    Fewer of the largest are left out where both together are more than all.
    """

    vector: TaskVector
    density: float
    gamma: float
    edge: Literal["upper", "lower"]
    """Above the band lie the outliers; above its lower edge these and the band."""
    extent: Extent = Extent.TENSOR

    def count(self, n: int) -> int:
        """Return how many of `n` elements lie above the edge."""
        inside = min(n, int(self.density * n))
        outliers = min(int(self.gamma * n), n - inside)
        return outliers + (inside if self.edge == "lower" else 0)

    def placeholder(self) -> Threshold:
        """Return an answer of the right type, to follow a method without data."""
        return Threshold(key=0, ties=1, needed=1)


@dataclass(frozen=True)
class NonZero:
    """Ask how many elements of a tensor have a score above 0."""

    score: Score
    extent: Extent = Extent.TENSOR

    def placeholder(self) -> int:
        """Return an answer of the right type, to follow a method without data."""
        return 1


@dataclass(frozen=True)
class Largest:
    """Ask for the threshold of the k largest scores of a tensor."""

    score: Score
    k: int
    extent: Extent = Extent.TENSOR

    def count(self, n: int) -> int:
        """Return k for `n` elements, at most `n`."""
        return min(n, self.k)

    def placeholder(self) -> Threshold:
        """Return an answer of the right type, to follow a method without data."""
        return Threshold(key=0, ties=1, needed=1)


@dataclass(frozen=True)
class Quantile:
    """Ask for an order statistic of the scores of a tensor: number int(q (n - 1)) of them in ascending order, from 0."""

    score: Score
    q: float
    extent: Extent = Extent.TENSOR

    def count(self, n: int) -> int:
        """Return its place of `n` in descending order, from 1."""
        return n - int(self.q * (n - 1))

    def placeholder(self) -> Threshold:
        """Return an answer of the right type, to follow a method without data."""
        return Threshold(key=0, ties=1, needed=1)


@dataclass(frozen=True)
class TieIndex:
    """Ask where the first `needed` elements equal to a threshold end, in index order.

    Over the whole model the order is that of the jobs; the answer is an (ordinal, element) pair.
    """

    vector: TaskVector | Score
    threshold: Threshold
    extent: Extent = Extent.TENSOR

    def placeholder(self) -> tuple[int, int]:
        """Return an answer of the right type, to follow a method without data."""
        return (0, 0)


@dataclass(frozen=True)
class AbsSum:
    """Ask for the sum of abs(delta) over the surviving entries of one task vector, in fp64."""

    vector: TaskVector
    extent: Extent = Extent.TENSOR

    def placeholder(self) -> float:
        """Return an answer of the right type, to follow a method without data."""
        return 1.0


@dataclass(frozen=True)
class Squares:
    """Ask for the sum of squares of each task vector over the selected elements, in fp64."""

    vectors: tuple[TaskVector, ...]
    selection: Selection | None = None
    """None: every element."""
    extent: Extent = Extent.TENSOR

    def placeholder(self) -> SquareSums:
        """Return an answer of the right type, to follow a method without data."""
        return SquareSums((1.0,) * len(self.vectors), 1)


@dataclass(frozen=True)
class SquareSums:
    """The sums of squares of several vectors."""

    totals: tuple[float, ...]
    n: int
    """Elements of the tensor, selected or not."""


@dataclass(frozen=True)
class Touches:
    """Ask how many entries of each task vector exceed `epsilon` in magnitude, and how many of them alone."""

    vectors: tuple[TaskVector, ...]
    epsilon: float
    extent: Extent = Extent.TENSOR

    def placeholder(self) -> Touched:
        """Return an answer of the right type, to follow a method without data."""
        return Touched((1,) * len(self.vectors), (0,) * len(self.vectors))


@dataclass(frozen=True)
class Touched:
    """How many elements each model has touched."""

    unique: tuple[int, ...]
    """It alone."""
    shared: tuple[int, ...]
    """It and at least one other."""


@dataclass(frozen=True)
class Gram:
    """Ask for the dot products of all pairs of models, or of task vectors, in fp64."""

    n: int
    """How many vectors there are."""
    vectors: tuple[TaskVector, ...] = ()
    """The task vectors, as they survive and are rescaled; empty: the models themselves, the base first if there is one."""
    extent: Extent = Extent.TENSOR

    def placeholder(self) -> Dots:
        """Return an answer of the right type, to follow a method without data: orthogonal unit vectors."""
        return Dots(tuple(float(i == j) for i in range(self.n) for j in range(i, self.n)), self.n)


@dataclass(frozen=True)
class Dots:
    """The dot products of all pairs of vectors."""

    values: tuple[float, ...]
    """The upper triangle of the Gram matrix, row by row."""
    n: int

    def matrix(self) -> NDArray[np.float64]:
        """Return the Gram matrix, (1, n, n)."""
        return full_matrices(np.array([self.values]), self.n)


@dataclass(frozen=True)
class ColumnGram:
    """Ask for the dot products of all pairs of vectors over each column, along a tensor's first axis, in fp64.

    A tensor of one axis is one column.
    """

    n: int
    """How many vectors there are."""
    vectors: tuple[TaskVector, ...] = ()
    """As for `Gram`."""
    extent: Extent = Extent.TENSOR

    def placeholder(self) -> ColumnDots:
        """Return an answer of the right type, to follow a method without data: orthogonal unit vectors, one column."""
        unit = np.eye(self.n)[np.triu_indices(self.n)]
        return ColumnDots(unit[:, None], self.n)


@dataclass(frozen=True)
class ColumnDots:
    """The dot products of all pairs of vectors, column by column."""

    values: NDArray[np.float64] = field(compare=False)
    """(pairs, columns); pairs are those of the upper triangle of a Gram matrix, row by row."""
    n: int

    def matrices(self) -> NDArray[np.float64]:
        """Return the Gram matrices, (columns, n, n)."""
        return full_matrices(self.values.T, self.n)


@dataclass(frozen=True)
class SignTotal:
    """Ask how many elements of the whole model elect + minus how many elect -."""

    merge: TaskVectorMerge
    extent: Extent = Extent.MODEL

    def placeholder(self) -> int:
        """Return an answer of the right type, to follow a method without data."""
        return 0


@dataclass(frozen=True)
class LowWords:
    """Ask which random words drop exactly round(rate * n) elements of a tensor: the smallest (word, index).

    The answer (w, e): those with a word below w, and those before element e whose word is w. It is a
    function of the random stream alone; no data is read for it.
    """

    vector: TaskVector
    rate: float
    extent: Extent = Extent.TENSOR

    def count(self, n: int) -> int:
        """Return how many of `n` elements are dropped."""
        return round(self.rate * n)

    def placeholder(self) -> tuple[int, int]:
        """Return an answer of the right type, to follow a method without data."""
        return (1, 0)


@dataclass(frozen=True)
class SquareTotal:
    """The sum of squares of a model's Fisher diagonal over all merged tensors."""

    total: float
    n: int
    """Elements it was taken over."""


@dataclass(frozen=True)
class FisherSquares:
    """Ask for the sum of squares of one model's Fisher diagonal over the whole model, in fp64."""

    model: int
    extent: Extent = Extent.MODEL

    def placeholder(self) -> SquareTotal:
        """Return an answer of the right type, to follow a method without data."""
        return SquareTotal(1.0, 1)


@dataclass(frozen=True)
class Mixing:
    """Ask for the matrices that turn the deviations of each model's rows from the average into a correction."""

    alpha: float
    """What lies off the diagonals of the Gram matrices is multiplied by it."""
    weights: tuple[float, ...]
    extent: Extent = Extent.TENSOR

    def placeholder(self) -> Mixers:
        """Return an answer of the right type, to follow a method without data."""
        return Mixers(())


Statistic = (
    TopK
    | Band
    | NonZero
    | Largest
    | Quantile
    | TieIndex
    | AbsSum
    | Squares
    | Touches
    | Gram
    | ColumnGram
    | SignTotal
    | LowWords
    | FisherSquares
    | Mixing
)
Answer = (
    Mixers
    | Threshold
    | Dots
    | ColumnDots
    | SquareSums
    | Touched
    | SquareTotal
    | tuple[int, int]
    | float
    | int
)


def partials_of(statistic: Statistic) -> int:
    """Return how many fp64 partial sums answer a statistic for each block of elements."""
    if isinstance(statistic, Gram):
        return statistic.n * (statistic.n + 1) // 2
    if isinstance(statistic, Squares):
        return len(statistic.vectors)
    return int(isinstance(statistic, AbsSum | FisherSquares))


def passes_of(statistics: Sequence[Statistic]) -> int:
    """Return how many passes over a scope answer the statistics, as a rule: ranks take a second where nothing is sampled."""
    return 1 + any(isinstance(r, Largest | Quantile) and sees_rows(r.score) for r in statistics)
