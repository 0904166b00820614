"""The result of any rule, drawn towards the base: the merged task vector times a factor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules.base import Inputs, Rule, vectors_of
from streammerge.algebra.task_vectors import TaskVector
from streammerge.records import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


@dataclass(frozen=True)
class Scaled(Rule):
    """theta = theta_0 + scale * (theta' - theta_0) in fp64, where theta' is the result of a different rule."""

    rule: Rule
    scale: float

    def __post_init__(self) -> None:
        """Cut blocks as the other rule does."""
        object.__setattr__(self, "rows_at_once", self.rule.rows_at_once)

    @property
    def vectors(self) -> tuple[TaskVector, ...]:
        """The other rule's task vectors; empty if it has none."""
        return vectors_of(self.rule)

    @property
    def extent(self) -> Extent:
        """The other rule's."""
        return self.rule.extent

    @property
    def removes(self) -> bool:
        """True if the other rule may remove entries of task vectors."""
        return self.rule.removes

    def kept(self, inputs: Inputs) -> tuple[int, ...]:
        """See `Rule`."""
        return self.rule.kept(inputs)

    def look_at_fishers(self, fishers: Sequence[torch.Tensor]) -> tuple[int, int]:
        """See `Rule`."""
        return self.rule.look_at_fishers(fishers)

    def merged(self, inputs: Inputs) -> torch.Tensor:
        """Return theta, of the blocks' shape."""
        return self.moved(self.rule.merged(inputs), inputs.theta_0)

    def moved(self, merged: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Return theta for the other rule's result; neither is changed."""
        return (merged.double() - base).mul_(self.scale).add_(base)


def scaled(rule: Rule, factor: float) -> Rule:
    """Return a rule whose merged task vector is `factor` times as long."""
    own: Any = rule
    return replace(own, scale=own.scale * factor) if hasattr(own, "scale") else Scaled(rule, factor)
