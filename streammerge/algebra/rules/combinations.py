"""Weighted sums of rows or columns of tensors; each row or column has its own weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import TYPE_CHECKING

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules.base import Inputs, Rule, zeros
from streammerge.algebra.task_vectors import TaskVector, terms_of
from streammerge.records import dataclass

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Coefficients = Callable[[NDArray[np.float64]], NDArray[np.float64]]
    """Function from Gram matrices, (rows, k, k), to the weights of the vectors, (rows, k)."""


@dataclass(frozen=True)
class RowCombination(Rule):
    """Each row is a weighted sum of the models' rows, or of the base's and the task vectors', with its own weights.

    The weights are a function of the row's Gram matrix. A tensor with one axis is one row.
    """

    coefficients: Coefficients
    vectors: tuple[TaskVector, ...] = ()
    """The task vectors; empty: the models themselves, after the base if the method has one."""

    @property
    def extent(self) -> Extent:
        """Whole rows."""
        return Extent.ROW

    def combined(self, inputs: Inputs, weights: torch.Tensor) -> torch.Tensor:
        """Return the sum in fp64 for blocks of shape (rows, length) and `weights` (rows, k) in fp64."""
        return _combined(self.vectors, [one.unsqueeze(1) for one in weights.unbind(1)], inputs)


@dataclass(frozen=True)
class ColumnCombination(Rule):
    """Each column (along the first axis) is a weighted sum of the models', or of the base's and the task vectors'."""

    weights: NDArray[np.float64] = field(compare=False)
    """Weights (k, columns) of the vectors, which are those of `RowCombination`."""
    vectors: tuple[TaskVector, ...] = ()

    @property
    def extent(self) -> Extent:
        """Whole columns."""
        return Extent.COLUMN

    def combined(self, inputs: Inputs, weights: torch.Tensor) -> torch.Tensor:
        """Return the sum in fp64 for blocks of shape (rows, columns); `weights` are this rule's, as a tensor."""
        return _combined(self.vectors, [one.unsqueeze(0) for one in weights], inputs)


def _combined(vectors: Sequence[TaskVector], weights: Sequence[torch.Tensor], inputs: Inputs) -> torch.Tensor:
    """Return the weighted sum of vectors, plus the base if they are task vectors; weights broadcast to the blocks."""
    models, base, where, _ = inputs
    assert base is not None or not vectors
    scaled = [w * v.rescale for w, v in zip(weights, vectors, strict=True)] if vectors else weights
    total = zeros(models[0])
    for weight, term in zip(scaled, terms_of(vectors, models, base, where), strict=True):
        total = total + weight * term.double()
    return base.double() + total if vectors and base is not None else total
