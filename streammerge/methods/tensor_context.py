"""`TensorContext`: the facts that a method may use about the tensor that it merges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from streammerge.algebra.task_vectors import TaskVector
from streammerge.records import dataclass

TensorKind = Literal["attention", "mlp", "norm", "embedding", "head", "other"]


@dataclass(frozen=True)
class TensorContext:
    """One tensor of a merge, as a method sees it.

    The planner fills it in from headers and the config. It is the same for every block of a tensor.
    """

    n_models: int
    """Number of models without the base."""
    ordinal: int = 0
    """Index of this tensor in the order of the merge, from 0."""
    name: str = ""
    """The tensor's name in the output."""
    shape: tuple[int, ...] = ()
    """The shape of the whole tensor, even if a formula gets only a block of it."""
    kind: TensorKind = "other"
    """The kind of tensor, as far as its name shows."""
    layer: int | None = None
    """Index of its layer, from 0; None outside the layers."""
    n_layers: int | None = None
    """Number of layers in its stack; None outside the layers."""
    has_base: bool = False
    """Whether the base's tensor takes part in the arithmetic."""
    fisher: bool = True
    """Whether the models' Fisher diagonals cover this tensor."""
    gram: bool = True
    """Whether the models' Gram matrices cover this tensor."""
    matrix: tuple[int, int] | None = None
    """The shape of each matrix of it, if a method of whole matrices decomposes it; None: it belongs to the rest."""
    deltas: tuple[bool, ...] = ()
    """For each model, whether it is read as a difference from the base; empty: none is."""
    dropped: tuple[TaskVector, ...] = ()
    """The task vectors after the drop that precedes the method; empty without a drop."""
    rescaled_by_norm: bool = False
    """Whether that drop rescales each tensor by its own factor."""

    @property
    def n_elements(self) -> int:
        """Number of elements of the whole tensor."""
        n = 1
        for length in self.shape:
            n *= length
        return n

    @property
    def depth(self) -> float | None:
        """Relative depth in its stack of layers, from 0 to 1; None outside the layers."""
        if self.layer is None or self.n_layers is None:
            return None
        return self.layer / (self.n_layers - 1) if self.n_layers > 1 else 1.0

    def task_vectors(self, weights: Sequence[float]) -> list[TaskVector]:
        """Return the models' task vectors with their weights; a drop before the method is already applied."""
        vectors = self.dropped or tuple(TaskVector(i) for i in range(self.n_models))
        return [replace(vector, weight=weight) for vector, weight in zip(vectors, weights, strict=True)]
