"""What a method may know of the merge when it chooses its rule for one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streammerge.algebra.task_vectors import TaskVector


@dataclass(frozen=True)
class TensorContext:
    """One tensor of a merge, from a method's side."""

    n_models: int
    ordinal: int = 0
    """Number of this tensor in the order of the merge."""
    fisher: bool = True
    """Whether the models' Fisher diagonals cover this tensor."""
    gram: bool = True
    """Whether the models' Gram matrices cover this tensor."""
    has_base: bool = False
    """Whether there is a base whose tensor takes part."""
    dropped: tuple[TaskVector, ...] = ()
    """The task vectors after a drop that comes before the method; empty without one."""
    rescaled_by_norm: bool = False
    """Whether that drop has a factor of its own for each tensor."""
    tensor: str = ""
    """Its name."""

    def task_vectors(self, weights: Sequence[float]) -> list[TaskVector]:
        """Return the models' task vectors with their weights, dropped entries already marked."""
        vectors = self.dropped or tuple(TaskVector(i) for i in range(self.n_models))
        return [replace(vector, weight=weight) for vector, weight in zip(vectors, weights, strict=True)]
