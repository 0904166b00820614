"""Sums of the models themselves, each with one weight for all of its elements."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.algebra.rules.base import Inputs, Rule, zeros
from streammerge.records import dataclass

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WeightedSum(Rule):
    """theta = (w_0 theta_0 + sum_i w_i theta_i) / divisor."""

    weights: tuple[float, ...]
    divisor: float = 1.0
    base_weight: float = 0.0
    """w_0; 0 if the base is not part of the sum."""

    def merged(self, inputs: Inputs) -> torch.Tensor:
        """Return the sum over the models, and over the base if it has a weight."""
        total = zeros(inputs.models[0])
        if self.base_weight:
            total = total + self.base_weight * inputs.theta_0.double()
        for weight, theta in zip(self.weights, inputs.models, strict=True):
            total = total + weight * theta.double()
        return total / self.divisor if self.divisor != 1.0 else total


@dataclass(frozen=True)
class CopyOf(Rule):
    """One model's tensor, unchanged except for the output's dtype."""

    model: int = 0

    def merged(self, inputs: Inputs) -> torch.Tensor:
        """Return the model's values as a weighted sum, so that a non-finite value in any model shows."""
        weights = tuple(float(i == self.model) for i in range(len(inputs.models)))
        return WeightedSum(weights).merged(inputs)
