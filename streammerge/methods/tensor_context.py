"""What a method may know of the tensor that it merges: what it is, and what comes with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from streammerge.algebra.task_vectors import TaskVector

TensorKind = Literal["attention", "mlp", "norm", "embedding", "head", "other"]


@dataclass(frozen=True)
class TensorContext:
    """One tensor of a merge, from a method's side.

    The planner fills it in. All of it is known from headers and the config, and is the same for every piece of a tensor.
    """

    n_models: int
    """Number of models beside the base."""
    ordinal: int = 0
    """Number of this tensor in the order of the merge, from 0."""
    name: str = ""
    """Its name in the output."""
    shape: tuple[int, ...] = ()
    """The shape of the whole tensor, whatever piece of it a formula is given."""
    kind: TensorKind = "other"
    """What it is, as far as its name tells."""
    layer: int | None = None
    """Number of its layer, from 0; None outside of the layers."""
    n_layers: int | None = None
    """How many layers its stack has; None outside of the layers."""
    has_base: bool = False
    """Whether there is a base whose tensor takes part."""
    fisher: bool = True
    """Whether the models' Fisher diagonals cover this tensor."""
    gram: bool = True
    """Whether the models' Gram matrices cover this tensor."""
    dropped: tuple[TaskVector, ...] = ()
    """The task vectors after a drop that comes before the method; empty without one."""
    rescaled_by_norm: bool = False
    """Whether that drop has a factor of its own for each tensor."""

    @property
    def n_elements(self) -> int:
        """Number of elements of the whole tensor."""
        n = 1
        for length in self.shape:
            n *= length
        return n

    @property
    def depth(self) -> float | None:
        """Where in its stack of layers it lies, from 0 to 1; None outside of the layers."""
        if self.layer is None or self.n_layers is None:
            return None
        return self.layer / (self.n_layers - 1) if self.n_layers > 1 else 1.0

    def task_vectors(self, weights: Sequence[float]) -> list[TaskVector]:
        """Return the models' task vectors with their weights, dropped entries already marked."""
        vectors = self.dropped or tuple(TaskVector(i) for i in range(self.n_models))
        return [replace(vector, weight=weight) for vector, weight in zip(vectors, weights, strict=True)]
