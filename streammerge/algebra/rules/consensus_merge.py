"""The sum of task vectors at the elements that matter to several models (Consensus task arithmetic)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.algebra.rules.base import Inputs, Rule
from streammerge.algebra.task_vectors import TaskVector
from streammerge.records import dataclass

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ConsensusMerge(Rule):
    """theta = theta_0 + scale * sum_i delta_i where at least `k` models need the element, else theta_0.

    Model i needs an element if abs(delta_i) exceeds `threshold` times abs(sum_j delta_j - delta_i)
    (https://arxiv.org/abs/2405.07813).
    """

    vectors: tuple[TaskVector, ...]
    k: int
    threshold: float
    scale: float = 1.0

    def merged(self, inputs: Inputs) -> torch.Tensor:
        """Return the base and its share of the summed task vectors."""
        import torch

        base = inputs.theta_0
        entries = [v.entries(inputs.models[v.model], base, inputs.where) for v in self.vectors]
        total = sum(entries[1:], start=0.0 + entries[0])
        needed = sum((abs(one) > self.threshold * abs(total - one)) * 1 for one in entries)
        # A non-finite sum is kept, so that the check on the output sees it.
        agreed = torch.where((needed >= self.k) | ~torch.isfinite(total), total, 0.0)
        return base.double() + self.scale * agreed
