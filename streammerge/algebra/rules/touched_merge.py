"""The mean of task vectors over the models that have touched an element."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from streammerge.algebra.rules.base import Inputs, Rule, zeros
from streammerge.algebra.task_vectors import TaskVector
from streammerge.records import dataclass

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TouchedMerge(Rule):
    """theta = theta_0 + the mean of the task vectors over the models that touched the element.

    A model touched an element if its entry exceeds `epsilon` in magnitude. An entry that a single model touched is
    multiplied by that model's factor (RAM and RAM+, https://arxiv.org/abs/2601.13572).
    """

    vectors: tuple[TaskVector, ...]
    epsilon: float
    factors: tuple[float, ...]

    def merged(self, inputs: Inputs) -> torch.Tensor:
        """Return the base and the mean over the models that have touched each element."""
        import torch

        total = zeros(inputs.theta_0)
        unique, count = total.clone(), total.clone()
        entries = touched_entries(self.vectors, self.epsilon, inputs)
        for factor, (tau, touched) in zip(self.factors, entries, strict=True):
            entry = tau.masked_fill(~touched, 0.0)
            total = total + entry
            unique = unique + factor * entry
            count = count + touched
        return inputs.theta_0.double() + torch.where(count == 1, unique, total / count.clamp(min=1.0))


def touched_entries(
    vectors: Sequence[TaskVector], epsilon: float, inputs: Inputs
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each task vector in fp64 with the mask of its touched entries; non-finite entries count as touched."""
    models, base, where = inputs.models, inputs.theta_0, inputs.where
    for vector in vectors:
        tau = vector.rescale * vector.surviving(models[vector.model], base, where).double()
        yield tau, ~(tau.abs() <= epsilon)
