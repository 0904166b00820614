"""The largest of those task vectors' entries that have the sign of their sum (EMR-Merging's unified task vector)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.algebra.rules.base import Inputs, Rule
from streammerge.algebra.task_vectors import TaskVector
from streammerge.records import dataclass

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LargestAgreeing(Rule):
    """theta = theta_0 + scale * s * max abs(delta_i) over the models with sign(delta_i) = s, s = sign(sum_i delta_i).

    Where the sum is 0 the base stays (https://arxiv.org/abs/2405.17461).
    """

    vectors: tuple[TaskVector, ...]
    scale: float = 1.0

    def merged(self, inputs: Inputs) -> torch.Tensor:
        """Return the base and its share of the largest agreeing entries."""
        import torch

        base = inputs.theta_0
        entries = [v.entries(inputs.models[v.model], base, inputs.where) for v in self.vectors]
        total = sum(entries[1:], start=0.0 + entries[0])
        up = down = torch.zeros_like(total)
        for one in entries:
            up, down = torch.maximum(up, one), torch.minimum(down, one)
        merged = torch.where(total > 0, up, torch.where(total < 0, down, 0.0))
        # A non-finite sum is kept, so that the check on the output sees it.
        return base.double() + self.scale * torch.where(torch.isfinite(total), merged, total)
