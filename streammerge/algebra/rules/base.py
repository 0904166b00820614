"""The contract of a merge rule: the members of a subclass, and the arguments of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from streammerge.algebra.extent import Extent
from streammerge.algebra.task_vectors import TaskVector, Where

if TYPE_CHECKING:
    import torch


class Inputs(NamedTuple):
    """The same elements of every input, fp32 or fp64, of equal shape, and their position in the tensor."""

    models: Sequence[torch.Tensor]
    base: torch.Tensor | None
    where: Where
    fishers: Sequence[torch.Tensor] = ()
    """The models' Fisher diagonals, for rules that weigh by them."""

    @property
    def theta_0(self) -> torch.Tensor:
        """The base, which a rule of task vectors always has."""
        assert self.base is not None
        return self.base


class Rule:
    """The formula that computes every element of a tensor once the statistics are known: a frozen value.

    Called on blocks it returns theta in fp64. That is the reference, and it runs wherever a backend has not registered
    a faster implementation for the class. A subclass is a frozen dataclass that defines `merged`; if it merges task
    vectors, it has a field `vectors`.
    """

    rows_at_once = 1
    """If the extent is ROW: the number of rows computed in one operation; blocks are cut at its multiples."""

    @property
    def extent(self) -> Extent:
        """The elements that it must see at once."""
        return Extent.ROW if ranked(self) else Extent.ELEMENT

    @property
    def unscaled(self) -> Rule | None:
        """The rule with a scale of 1, if a kernel computes several scales at a time: base + scale * the same sum."""
        return None

    @property
    def removes(self) -> bool:
        """Whether it may remove entries of task vectors."""
        return any(vector.removes for vector in vectors_of(self))

    def __call__(
        self,
        models: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        where: Where,
        fishers: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Return theta in fp64 for fp32 (or fp64) blocks of equal shape."""
        return self.merged(Inputs(models, base, where, fishers))

    def merged(self, inputs: Inputs) -> torch.Tensor:
        """Return theta in fp64, of the blocks' shape."""
        raise NotImplementedError

    def kept(self, inputs: Inputs) -> tuple[int, ...]:
        """Return the number of surviving entries of each task vector; empty if all survive."""
        models, base, where, _ = inputs
        if base is None or not self.removes:
            return ()
        return tuple(v.kept(models[i], base, where) for i, v in enumerate(vectors_of(self)))

    def look_at_fishers(self, fishers: Sequence[torch.Tensor]) -> tuple[int, int]:
        """Return the number of invalid values of the diagonals, and of elements that a floor decides."""
        return 0, 0


def vectors_of(rule: Rule) -> tuple[TaskVector, ...]:
    """Return the task vectors of a rule; empty if it has none."""
    vectors: tuple[TaskVector, ...] = getattr(rule, "vectors", ())
    return vectors


def ranked(rule: Rule) -> bool:
    """Return whether entries are dropped by their rank in a row, which needs whole rows."""
    return any(vector.rank_drop is not None for vector in vectors_of(rule))


def removing(rule: Rule) -> tuple[TaskVector, ...]:
    """Return the task vectors of a rule if any of them may lose entries; else an empty tuple."""
    return vectors_of(rule) if rule.removes else ()


def zeros(like: torch.Tensor) -> torch.Tensor:
    """Return fp64 zeros of a block's shape; multiplying by 0 would turn infinity into NaN."""
    import torch

    return torch.zeros_like(like, dtype=torch.float64)
