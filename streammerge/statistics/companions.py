"""Statistics of the models' Fisher diagonals and Gram matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import BlockMath, Call
from streammerge.algebra.extent import Extent
from streammerge.algebra.regression import regression_operators
from streammerge.numerics.ordered_sum import OrderedSum, Part, in_order, part_of
from streammerge.records import dataclass
from streammerge.statistics.base import (
    Cost,
    Known,
    Lock,
    MeasuredTensor,
    Measurement,
    NotFiniteError,
    Reducer,
    Source,
    Statistic,
    from_hex,
    hex_of,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SquareTotal:
    """The sum of squares of a model's Fisher diagonal over all merged tensors."""

    total: float
    n: int
    """Number of elements summed."""


@dataclass(frozen=True)
class FisherSquares(Statistic[SquareTotal]):
    """The sum of squares of one model's Fisher diagonal over the whole model, in fp64.

    Tensors whose sums the store recorded are not read.
    """

    source = Source.FISHERS
    model: int
    extent: Extent = Extent.MODEL

    @property
    def cost(self) -> Cost:
        """One sum per block."""
        return Cost(partials=1)

    def calls(self) -> tuple[Call, ...]:
        """Return the methods of `BlockMath` that it calls."""
        return (Call("fisher_squares"),)

    def reads(self, tensor: MeasuredTensor) -> bool:
        """Return whether the diagonal of this tensor must be read because its sum of squares is not recorded."""
        return bool(tensor.square_sums) and tensor.square_sums[self.model] is None

    def placeholder(self) -> SquareTotal:
        """Return one element of square 1."""
        return SquareTotal(1.0, 1)

    def reducer(self, over: Measurement) -> Reducer[SquareTotal]:
        """Return the reducer over the tensors whose sums are not recorded."""
        lengths = {tensor.ordinal: tensor.n for tensor in over.tensors if tensor.square_sums}
        sums = (
            (tensor.ordinal, tensor.square_sums[self.model]) for tensor in over.tensors if tensor.square_sums
        )
        recorded = {ordinal: known for ordinal, known in sums if known is not None}
        squares = FisherSquaresReducer(self.model, recorded, lengths)
        return squares if len(recorded) < len(lengths) else Known(squares.value)

    def to_json(self, value: SquareTotal) -> object:
        """Return the sum and the number of elements."""
        return {"squares": [hex_of(value.total), value.n]}

    def from_json(self, plain: Any) -> SquareTotal:
        """Return the sum."""
        match plain:
            case {"squares": [str(total), int(n)]}:
                return SquareTotal(from_hex(total), n)
        raise ValueError("no sum of squares")


class FisherSquaresReducer(Reducer[SquareTotal]):
    """Sums the squares of one model's diagonal: per tensor over blocks in index order, then over tensors in order.

    Parameters
    ----------
    recorded
        Sums of the tensors that need not be read, by ordinal.
    lengths
        Number of elements of every tensor that has a diagonal, by ordinal.
    """

    reads_models = False

    def __init__(self, model: int, recorded: Mapping[int, float], lengths: Mapping[int, int]) -> None:
        self._model = model
        self._recorded = dict(recorded)
        self._lengths = dict(lengths)
        self._totals: dict[int, float] = {}
        self._sums: dict[int, OrderedSum] = {}
        self._left = {ordinal: n for ordinal, n in lengths.items() if ordinal not in recorded}
        self._lock = Lock()

    def measured(
        self, ordinal: int, start: int, n: int, math: BlockMath
    ) -> tuple[dict[int, float], dict[int, tuple[int, Part]]]:
        """Return the partial sums of one block; nothing for a tensor whose sum is recorded."""
        if ordinal not in self._left:
            return {}, {}
        partials, bad = math.fisher_squares(self._model)
        if bad:
            raise NotFiniteError(ordinal)
        return {}, {ordinal: (n, part_of(ordinal, start, n, partials[:, None]))}

    def _of(self, ordinal: int) -> OrderedSum:
        return self._sums.setdefault(ordinal, OrderedSum([(ordinal, self._lengths[ordinal])]))

    def _take_off(self, ordinal: int, n: int) -> None:
        with self._lock:
            self._left[ordinal] -= n
            if not self._left[ordinal]:
                self._totals[ordinal] = self._sums.pop(ordinal).totals[0]

    @property
    def value(self) -> SquareTotal:
        """The sum; recorded sums give the same bits as reading the tensors."""
        known = self._recorded | self._totals
        totals = np.array([known[ordinal] for ordinal in sorted(known)])
        return SquareTotal(in_order(totals), sum(self._lengths.values()))

    def part(self) -> tuple[dict[int, float], dict[int, tuple[int, Part]]]:
        """Return the sums of complete tensors, and for other tensors the number of elements added and the partial sums."""
        begun = {
            ordinal: (self._lengths[ordinal] - self._left[ordinal], sums.part())
            for ordinal, sums in self._sums.items()
        }
        return self._totals, begun

    def absorb(self, part: tuple[dict[int, float], dict[int, tuple[int, Part]]]) -> None:
        """Add sums, each at its place."""
        complete, begun = part
        with self._lock:
            self._totals |= complete
            for ordinal in complete:
                self._left[ordinal] = 0
        for ordinal, (n, sums) in begun.items():
            with self._lock:
                mine = self._of(ordinal)
            mine.absorb(sums)
            self._take_off(ordinal, n)


@dataclass(frozen=True)
class RegressionOperators(Statistic["tuple[torch.Tensor, ...]"]):
    """The matrices P_i, fp64 (inputs, inputs), that RegMean applies to the models' deviations from their average.

    P_i = G_i (sum_j G_j)^+, where G_i is the Gram matrix of model i multiplied by its weight.
    """

    source = Source.GRAMS
    alpha: float
    """Factor of the off-diagonal entries of the Gram matrices."""
    weights: tuple[float, ...]
    extent: Extent = Extent.TENSOR

    def placeholder(self) -> tuple[torch.Tensor, ...]:
        """Return no matrices."""
        return ()

    def of_grams(self, grams: list[NDArray[np.float32]]) -> tuple[torch.Tensor, ...]:
        """Return the matrices, one per model; the Gram matrices are removed from the list one by one."""
        return regression_operators(grams, self.alpha, self.weights)
