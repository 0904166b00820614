"""Statistics that are fp64 sums: of magnitudes, of squares, and of dot products of all pairs of vectors.

Partial sums of 4096 elements are added one after the other in index order, so the bits depend neither on how blocks are
cut nor on the order in which they arrive.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import BlockMath, Call
from streammerge.algebra.extent import Extent
from streammerge.algebra.gram_matrix import full_matrices
from streammerge.algebra.scores import Selection
from streammerge.algebra.task_vectors import TaskVector
from streammerge.numerics.ordered_sum import BLOCK, OrderedSum, Part, part_of
from streammerge.records import dataclass
from streammerge.statistics.base import (
    A,
    Cost,
    Measurement,
    Reducer,
    Statistic,
    from_hex,
    hex_of,
)


class BlockSums(Statistic[A]):
    """A statistic whose value follows from one or more sums over all elements."""

    @abstractmethod
    def partials(self, math: BlockMath) -> NDArray[np.float64]:
        """Return the partial sums of a block, (blocks of 4096 elements, columns)."""

    @abstractmethod
    def of_totals(self, totals: list[float], n: int) -> A:
        """Return the value, given the sum of each column and the number of elements."""

    def reducer(self, over: Measurement) -> Reducer[A]:
        """Return the reducer that adds partial sums in index order."""
        return SumsReducer(self, [(tensor.ordinal, tensor.n) for tensor in over.tensors])


class SumsReducer(Reducer[A]):
    """Adds the partial sums of all blocks in index order.

    Parameters
    ----------
    tensors
        Ordinal and number of elements of each tensor, in order.
    """

    def __init__(self, statistic: BlockSums[A], tensors: list[tuple[int, int]]) -> None:
        self._statistic = statistic
        self._n = sum(n for _, n in tensors)
        self._sums = OrderedSum(tensors)

    def measured(self, ordinal: int, start: int, n: int, math: BlockMath) -> Part:
        """Return the partial sums of one block."""
        return part_of(ordinal, start, n, self._statistic.partials(math))

    @property
    def value(self) -> A:
        """The value computed from the sums."""
        return self._statistic.of_totals(self._sums.totals, self._n)

    def part(self) -> Part:
        """Return the sums so far and the waiting partial sums."""
        return self._sums.part()

    def absorb(self, part: Part) -> None:
        """Add the sums of a different accumulator, each in its place."""
        self._sums.absorb(part)


@dataclass(frozen=True)
class AbsSum(BlockSums[float]):
    """The sum of abs(delta) over the surviving entries of one task vector, in fp64."""

    vector: TaskVector
    extent: Extent = Extent.TENSOR

    @property
    def cost(self) -> Cost:
        """One sum per block."""
        return Cost(partials=1)

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of `BlockMath` that it calls."""
        return (Call("abs_sums", self.vector),)

    def placeholder(self) -> float:
        """Return 1."""
        return 1.0

    def partials(self, math: BlockMath) -> NDArray[np.float64]:
        """Return the sums of magnitudes, (blocks, 1)."""
        return math.abs_sums(self.vector)[:, None]

    def of_totals(self, totals: list[float], n: int) -> float:
        """Return the sum."""
        return totals[0]

    def to_json(self, value: float) -> object:
        """Return the sum."""
        return {"float": hex_of(value)}

    def from_json(self, plain: Any) -> float:
        """Return the sum."""
        match plain:
            case {"float": str(text)}:
                return from_hex(text)
        raise ValueError("no sum of magnitudes")


@dataclass(frozen=True)
class SquareSums:
    """The sums of squares of several vectors."""

    totals: tuple[float, ...]
    n: int
    """Number of elements of the tensor, selected or not."""


class SumsOfSquares(BlockSums[SquareSums]):
    """A statistic that is a sum of squares of several vectors."""

    def of_totals(self, totals: list[float], n: int) -> SquareSums:
        """Return the sums."""
        return SquareSums(tuple(totals), n)

    def to_json(self, value: SquareSums) -> object:
        """Return the sums and the number of elements."""
        return {"sums": [[hex_of(total) for total in value.totals], value.n]}

    def from_json(self, plain: Any) -> SquareSums:
        """Return the sums."""
        match plain:
            case {"sums": [[*totals], int(n)]}:
                return SquareSums(tuple(map(from_hex, totals)), n)
        raise ValueError("no sums of squares")


@dataclass(frozen=True)
class Squares(SumsOfSquares):
    """The sum of squares of each task vector over the selected elements, in fp64."""

    vectors: tuple[TaskVector, ...]
    selection: Selection | None = None
    """The selected elements; None: all of them."""
    extent: Extent = Extent.TENSOR

    @property
    def cost(self) -> Cost:
        """One sum per block and vector."""
        return Cost(partials=len(self.vectors))

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of `BlockMath` that it calls."""
        return (Call("squares", self.selection),)

    def placeholder(self) -> SquareSums:
        """Return the sums of one-element unit vectors."""
        return SquareSums((1.0,) * len(self.vectors), 1)

    def partials(self, math: BlockMath) -> NDArray[np.float64]:
        """Return the sums of squares, (blocks, vectors)."""
        return math.squares(self.vectors, self.selection)


@dataclass(frozen=True)
class Dots:
    """The dot products of all pairs of vectors."""

    values: tuple[float, ...]
    """The upper triangle of the Gram matrix, row by row."""
    n: int
    """Number of vectors."""

    def matrix(self) -> NDArray[np.float64]:
        """Return the Gram matrix, (1, n, n)."""
        return full_matrices(np.array([self.values]), self.n)


@dataclass(frozen=True)
class Gram(BlockSums[Dots]):
    """The dot products of all pairs of models, or of task vectors, in fp64."""

    n: int
    """Number of vectors."""
    vectors: tuple[TaskVector, ...] = ()
    """The task vectors, after drops, cuts and rescaling; empty: the models themselves, after the base if there is one."""
    extent: Extent = Extent.TENSOR

    @property
    def cost(self) -> Cost:
        """One sum per block and pair."""
        return Cost(partials=self.n * (self.n + 1) // 2)

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of `BlockMath` that it calls."""
        return (Call("dots"),)

    def placeholder(self) -> Dots:
        """Return orthogonal unit vectors."""
        return Dots(tuple(float(i == j) for i in range(self.n) for j in range(i, self.n)), self.n)

    def partials(self, math: BlockMath) -> NDArray[np.float64]:
        """Return the dot products, (blocks, pairs)."""
        return math.dots(self.vectors, BLOCK)

    def of_totals(self, totals: list[float], n: int) -> Dots:
        """Return the dot products."""
        return Dots(tuple(totals), self.n)

    def to_json(self, value: Dots) -> object:
        """Return the dot products and the number of vectors."""
        return {"dots": [[hex_of(dot) for dot in value.values], value.n]}

    def from_json(self, plain: Any) -> Dots:
        """Return the dot products."""
        match plain:
            case {"dots": [[*values], int(n)]} if n == self.n and len(values) == n * (n + 1) // 2:
                return Dots(tuple(map(from_hex, values)), n)
        raise ValueError("no dot products of so many vectors")


@dataclass(frozen=True)
class ColumnDots:
    """The dot products of all pairs of vectors, for each column."""

    values: NDArray[np.float64] = field(compare=False)
    """Array (pairs, columns); the pairs follow the upper triangle of a Gram matrix, row by row."""
    n: int
    """Number of vectors."""

    def matrices(self) -> NDArray[np.float64]:
        """Return the Gram matrices, (columns, n, n)."""
        return full_matrices(self.values.T, self.n)


@dataclass(frozen=True)
class ColumnGram(Statistic[ColumnDots]):
    """The dot products of all pairs of vectors over each column (along a tensor's first axis), in fp64.

    A tensor with one axis is one column. The value holds several numbers per column, so it is not recorded.
    """

    n: int
    """Number of vectors."""
    vectors: tuple[TaskVector, ...] = ()
    """As in `Gram`."""
    extent: Extent = Extent.TENSOR

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of `BlockMath` that it calls."""
        return (Call("add_column_dots"),)

    def placeholder(self) -> ColumnDots:
        """Return the dot products of orthogonal unit vectors, of one column."""
        unit = np.eye(self.n)[np.triu_indices(self.n)]
        return ColumnDots(unit[:, None], self.n)

    def reducer(self, over: Measurement) -> Reducer[ColumnDots]:
        """Return the reducer, which needs the blocks in order."""
        (tensor,) = over.tensors
        return _ColumnGramReducer(self, tensor.columns)


class _ColumnGramReducer(Reducer[ColumnDots]):
    """Adds the dot products of each column, block after block.

    One sum per column is too much to keep for every block, so blocks must come in order. A part is the sum of all blocks
    so far; the next reducer absorbs it first, and then adds its own blocks.
    """

    in_order = True

    def __init__(self, statistic: ColumnGram, columns: int) -> None:
        self._statistic = statistic
        self._sums = np.zeros((statistic.n * (statistic.n + 1) // 2, columns))
        self._next = 0

    def add(self, ordinal: int, start: int, n: int, math: BlockMath) -> None:
        """Add the products of one block."""
        assert start == self._next, "blocks out of order"
        math.add_column_dots(self._statistic.vectors, self._sums)
        self._next += n

    @property
    def value(self) -> ColumnDots:
        """The upper triangles of the Gram matrices."""
        return ColumnDots(self._sums, self._statistic.n)

    def part(self) -> tuple[int, NDArray[np.float64]]:
        """Return the next element and the sums before it, (pairs, columns)."""
        return self._next, self._sums

    def absorb(self, part: tuple[int, NDArray[np.float64]]) -> None:
        """Continue from the sums of all earlier blocks; nothing may have been added yet."""
        assert self._next == 0, "blocks out of order"
        self._next, self._sums = part[0], part[1].copy()
