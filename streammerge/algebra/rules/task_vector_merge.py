"""Sums of task vectors: all entries, or those of an elected sign."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from streammerge.algebra.rules.base import Inputs, Rule, ranked, zeros
from streammerge.algebra.task_vectors import TaskVector
from streammerge.records import dataclass

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TaskVectorMerge(Rule):
    """theta = theta_0 + scale * tau, where tau sums all task vectors' entries, or those of the elected sign."""

    vectors: tuple[TaskVector, ...]
    elect: bool = False
    """Elect a sign per element, the one with the larger total magnitude, and merge only its
    entries (TIES, https://arxiv.org/abs/2306.01708, section 4)."""
    zero_sign: int = 0
    """The sign elected if the totals are equal: +1, -1, or 0 for none (the base stays)."""
    normalize: bool = False
    """With `elect`: divide by the sum of the weights of the merged entries."""
    divisor: float = 1.0
    """Without `elect`: the divisor of the sum."""
    scale: float = 1.0

    @property
    def unscaled(self) -> TaskVectorMerge | None:
        """The rule with a scale of 1; None if entries are dropped by rank."""
        return None if ranked(self) else replace(self, scale=1.0)

    def merged(self, inputs: Inputs) -> torch.Tensor:
        """Return the base and its share of the summed task vectors."""
        base = inputs.theta_0
        if self.elect:
            tau = self._disjoint_merge(inputs)
        else:
            tau = zeros(base)
            for vector, theta in zip(self.vectors, inputs.models, strict=True):
                tau = tau + vector.entries(theta, base, inputs.where)
            tau = tau / self.divisor if self.divisor != 1.0 else tau
        return base.double() + self.scale * tau

    def _totals(self, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """Return total magnitude and total weight of the entries of each sign: (up, down, w_up, w_down)."""
        up = zeros(inputs.theta_0)
        down, up_weight, down_weight = up.clone(), up.clone(), up.clone()
        for vector, theta in zip(self.vectors, inputs.models, strict=True):
            tau = vector.entries(theta, inputs.theta_0, inputs.where)
            up = up + tau.clamp(min=0.0)
            down = down + (-tau).clamp(min=0.0)
            up_weight = up_weight + vector.weight * (tau > 0).double()
            down_weight = down_weight + vector.weight * (tau < 0).double()
        return up, down, up_weight, down_weight

    def _disjoint_merge(self, inputs: Inputs) -> torch.Tensor:
        import torch

        up, down, up_weight, down_weight = self._totals(inputs)
        lead = up - down  # the elected sign is that of the lead; a NaN has sign 0, which must not hide it
        negative = (lead < 0) | ((lead == 0) & (self.zero_sign < 0))
        merged = torch.where(negative, -down, up)
        if self.zero_sign == 0:
            merged = torch.where(lead == 0, 0.0, merged)
        if self.normalize:
            weight = torch.where(negative, down_weight, up_weight)
            merged = merged / torch.where(weight == 0, 1.0, weight)
        return merged

    def sign_total(self, inputs: Inputs) -> int:
        """Return the number of elements that elect + minus the number that elect - (TIES' whole-model majority)."""
        up, down, _, _ = self._totals(inputs)
        return int((up - down).sign().sum())
