"""The mean of models weighted, element by element, by their Fisher diagonals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from streammerge.algebra.rules.base import Inputs, Rule, zeros
from streammerge.algebra.task_vectors import TaskVector
from streammerge.records import dataclass

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FisherMean(Rule):
    """theta = sum_i a_i theta_i / sum_i a_i, per element, with a_i = coefficient_i * floored F_i.

    It is the mode of the product of the models' diagonal Laplace posteriors (Matena & Raffel 2022, equation 3). It is
    evaluated in fp64 relative to the target, the first model, and clamped to the range of the models' values, which
    the exact formula never leaves.
    """

    coefficients: tuple[float, ...]
    """lambda_i, divided by the norm of the model's diagonal if normalised; not negative."""
    floors: tuple[float, ...]
    """The floor of each diagonal, in units of the raw diagonal; 0: none."""
    add: bool = False
    """Whether the floor is added (F + floor); else F is raised to it (max(F, floor))."""
    average: tuple[float, ...] = ()
    """Weights of the plain average used where all diagonals are 0; empty: the target's value is used."""
    vectors: tuple[TaskVector, ...] = ()
    """The task vectors after a drop, if any: the models are theta_0 + their surviving, rescaled task vectors."""

    def merged(self, inputs: Inputs) -> torch.Tensor:
        """Return the weighted mean; elements without information in any model fall back to the target or an average."""
        import torch

        models, base, where, fishers = inputs
        thetas = [
            self.vectors[i].dropped_model(theta, base, where)
            if self.vectors and base is not None
            else theta.double()
            for i, theta in enumerate(models)
        ]
        target = low = high = thetas[0]
        moved, _, total = self._sums(thetas, fishers)
        for theta in thetas[1:]:
            low, high = torch.where(theta < low, theta, low), torch.where(theta > high, theta, high)
        merged = target + moved / torch.where(total == 0, 1.0, total)
        merged = torch.where(merged < low, low, merged)
        merged = torch.where(merged > high, high, merged)
        fallback = target
        if self.average:
            mean = zeros(target)
            for weight, theta in zip(self.average, thetas, strict=True):
                mean = mean + weight * theta
            fallback = mean / sum(self.average)
        return torch.where(total == 0, fallback, merged)

    def _sums(
        self, thetas: Sequence[torch.Tensor], fishers: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the sums of a_i (theta_i - theta_target), of the floors' part of a_i, and of a_i."""
        import torch

        moved = zeros(fishers[0])
        raised, total = moved.clone(), moved.clone()
        for i, fisher in enumerate(fishers):
            known = fisher.double()
            floored = (
                known + self.floors[i]
                if self.add
                else torch.where(known < self.floors[i], self.floors[i], known)
            )
            a = self.coefficients[i] * floored
            moved = moved + a * (thetas[i] - thetas[0])
            raised = raised + self.coefficients[i] * (floored - known)
            total = total + a
        return moved, raised, total

    def look_at_fishers(self, fishers: Sequence[torch.Tensor]) -> tuple[int, int]:
        """Return the number of negative values, and of elements in which floors make up more than half of the weight."""
        return sum(int((fisher < 0).sum()) for fisher in fishers), self.decided_by_floor(fishers)

    def decided_by_floor(self, fishers: Sequence[torch.Tensor]) -> int:
        """Return the number of elements in which floors make up more than half of the weight."""
        _, raised, total = self._sums([zeros(fisher) for fisher in fishers], fishers)
        return int((raised > 0.5 * total).sum())
