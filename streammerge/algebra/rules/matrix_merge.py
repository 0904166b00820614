"""Merges of whole matrices: a function of the task vectors' matrices in fp64, such as one of their singular values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules.base import Inputs, Rule
from streammerge.algebra.task_vectors import TaskVector, Where
from streammerge.records import dataclass

if TYPE_CHECKING:
    import torch


class Deltas(Protocol):
    """The task vectors of one matrix, weighted, each made when it is asked for, so that few are held at a time."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    def device(self) -> torch.device:
        """Where the matrices are, and every tensor that is made for them."""

    def __len__(self) -> int:
        """Return the number of models."""

    def __getitem__(self, model: int) -> torch.Tensor:
        """Return the matrix of a model, (rows, columns), fp64, which the caller may change."""


def each(deltas: Deltas) -> Iterator[torch.Tensor]:
    """Yield the matrix of every model in turn."""
    return (deltas[model] for model in range(len(deltas)))


def total_of(deltas: Deltas) -> torch.Tensor:
    """Return the sum of all matrices, in the order of the models."""
    total = deltas[0]
    for model in range(1, len(deltas)):
        total += deltas[model]
    return total


Combine = Callable[[Deltas], "torch.Tensor"]
"""Function that returns the merged task vector of a matrix, (rows, columns), fp64; a tensor of its own, on their device."""


class Part(NamedTuple):
    """The same elements of a model and of the base, flat."""

    theta: torch.Tensor
    base: torch.Tensor
    where: Where


Read = Callable[[int, int, int], Part]
"""Function that returns elements of a model and of the base, given the model and the elements' range in the block."""

AT_ONCE = 1 << 16
"""Elements that are widened at a time."""
_WIDENING = 120
"""Upper bound of the bytes per element that widening takes: copies in fp32 and fp64, masks, random words."""


def widening_bytes(size: int) -> int:
    """Return an upper bound of the bytes that widening a matrix of `size` elements takes, part by part."""
    return _WIDENING * min(size, AT_ONCE)


@dataclass(frozen=True, eq=False)
class MatrixMerge(Rule):
    """theta = theta_0 + scale * tau, where tau is a function of the models' whole matrices.

    Task vectors are fp64 differences. A non-finite value shows at its own element; all others are computed as if it were 0.
    """

    vectors: tuple[TaskVector, ...]
    shape: tuple[int, int]
    """Rows and columns of a matrix; a tensor with several has them one after the other."""
    combine: Combine
    scale: float = 1.0
    deltas: tuple[bool, ...] = ()
    """For each model, whether its elements are differences from the base already; empty: none is."""

    @property
    def extent(self) -> Extent:
        """Whole matrices."""
        return Extent.TENSOR

    @property
    def size(self) -> int:
        """Elements of a matrix."""
        return self.shape[0] * self.shape[1]

    def merged(self, inputs: Inputs) -> torch.Tensor:
        """Return theta, flat, for flat blocks of whole matrices."""

        def read(model: int, a: int, b: int) -> Part:
            where = Where(inputs.where.tensor, inputs.where.start + a, inputs.where.keys)
            return Part(inputs.models[model][a:b], inputs.theta_0[a:b], where)

        theta = inputs.theta_0.double().clone()
        for first in range(0, theta.numel(), self.size):
            theta[first : first + self.size] += self.change(read, first, theta.device)[0]
        return theta

    def change(self, read: Read, first: int, device: torch.device) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Return scale * tau of the matrix that begins at element `first`, flat, and the survivors of each model.

        The survivors are empty if no task vector loses entries. `device` is that of the elements that `read` returns.
        """
        matrices = _Matrices(self, read, first, device)
        change = self.combine(matrices).reshape(-1)
        change *= self.scale
        for (_, a), odd in matrices.odd.items():
            change[a : a + odd.numel()] += odd
        kept = tuple(matrices.kept.get(model, self.size) for model in range(len(self.vectors)))
        return change, kept if self.removes else ()


class _Matrices:
    """The task vectors of the matrix that begins at an element of a block."""

    def __init__(self, rule: MatrixMerge, read: Read, first: int, device: torch.device) -> None:
        self._rule, self._read, self._first = rule, read, first
        self.shape, self.device = rule.shape, device
        self.odd: dict[tuple[int, int], torch.Tensor] = {}
        """Values that are not finite, 0 elsewhere, by model and first element."""
        self.kept: dict[int, int] = {}
        """Number of surviving entries of each model."""

    def __len__(self) -> int:
        return len(self._rule.vectors)

    def __getitem__(self, model: int) -> torch.Tensor:
        import torch

        matrix = torch.empty(self._rule.size, dtype=torch.float64, device=self.device)
        self.kept[model] = 0
        for a in range(0, matrix.numel(), AT_ONCE):
            self._fill(matrix[a : a + AT_ONCE], model, a)
        return matrix.reshape(self.shape)

    def _fill(self, entries: torch.Tensor, model: int, a: int) -> None:
        """Write elements of a task vector, from element `a` of the matrix."""
        import torch

        vector = self._rule.vectors[model]
        start = self._first + a
        theta, base, where = self._read(vector.model, start, start + entries.numel())
        if self._rule.deltas and self._rule.deltas[vector.model]:
            base = torch.zeros_like(theta)
        entries.copy_(theta)
        entries -= base
        if vector.removes:
            entries.masked_fill_(~vector.mask(theta, base, where), 0.0)
            self.kept[model] += vector.kept(theta, base, where)
        if vector.coefficient != 1.0:
            entries *= vector.coefficient
        if not math.isfinite(float(entries.sum())):
            finite = torch.isfinite(entries)
            self.odd[model, a] = entries.masked_fill(finite, 0.0)
            entries.masked_fill_(~finite, 0.0)
