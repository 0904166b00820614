"""A rule of one's own, in one file: task vectors, each entry held within a limit of its model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from streammerge.algebra.rules import Inputs, Rule
from streammerge.algebra.task_vectors import TaskVector


@dataclass(frozen=True)
class CappedMerge(Rule):
    """theta = theta_0 + sum_i w_i clamp(tau_i, -limit_i, limit_i)."""

    vectors: tuple[TaskVector, ...]
    limits: tuple[float, ...]

    def merged(self, inputs: Inputs) -> torch.Tensor:
        models, base, where = inputs.models, inputs.theta_0, inputs.where
        merged = base.double()
        for vector, theta, limit in zip(self.vectors, models, self.limits, strict=True):
            tau = vector.rescale * vector.surviving(theta, base, where).double()
            merged = merged + vector.weight * tau.clamp(-limit, limit)
        return merged
