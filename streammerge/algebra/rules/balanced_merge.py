"""The mean of task vectors, weighted by how each entry fares in the competition of parameters (PCB-Merging)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.algebra.competition import Range, clamped, score
from streammerge.algebra.rules.base import Inputs, Rule
from streammerge.algebra.task_vectors import TaskVector
from streammerge.records import dataclass

if TYPE_CHECKING:
    import torch

_LEAST = 1e-12
"""The smallest divisor."""


@dataclass(frozen=True)
class BalancedMerge(Rule):
    """theta = theta_0 + scale * sum_i s_i c_i / sum_i s_i, where c_i is delta_i clamped and s_i its score, from 0 to 1.

    A score counts from the threshold of its model (0) to the model's highest (1); see `streammerge.algebra.competition`.
    """

    vectors: tuple[TaskVector, ...]
    ranges: tuple[Range, ...]
    """The clamp of each model's magnitudes."""
    scores: tuple[Range, ...]
    """For each model, the threshold of its scores and its highest score."""
    scale: float = 1.0

    def merged(self, inputs: Inputs) -> torch.Tensor:
        """Return the base and the balanced mean; where the sum is not finite, the sum, so that the check on the output sees it."""
        import torch

        base = inputs.theta_0
        entries = [v.entries(inputs.models[v.model], base, inputs.where) for v in self.vectors]
        held = [clamped(one, span) for one, span in zip(entries, self.ranges, strict=True)]
        total = sum(held[1:], start=0.0 + held[0])
        merged = weights = torch.zeros_like(total)
        for one, span, (threshold, top) in zip(held, self.ranges, self.scores, strict=True):
            if not top > threshold:
                continue
            scores = score(one, total, span, len(held)).double()
            weight = (scores.clamp(min=threshold) - threshold) / (top - threshold)
            merged, weights = merged + weight * one, weights + weight
        mean = torch.where(torch.isfinite(total), merged / weights.clamp(min=_LEAST), total)
        return base.double() + self.scale * mean
