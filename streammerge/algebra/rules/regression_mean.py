"""The mean of models, corrected along the inputs that their Gram matrices describe (RegMean)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules.base import Inputs, Rule
from streammerge.records import dataclass

if TYPE_CHECKING:
    import torch

ROWS_AT_ONCE = 64
"""Number of rows per matrix product."""


@dataclass(frozen=True, eq=False)
class RegressionMean(Rule):
    """theta = mean + sum_i (theta_i - mean) P_i, row by row; see `regmean`."""

    weights: tuple[float, ...]
    operators: tuple[torch.Tensor, ...]
    """P_i per model, fp64 (inputs, inputs)."""

    rows_at_once = ROWS_AT_ONCE

    @property
    def extent(self) -> Extent:
        """Whole rows."""
        return Extent.ROW

    def merged(self, inputs: Inputs) -> torch.Tensor:
        """Return theta, flat, for flat blocks of whole rows.

        Products take `ROWS_AT_ONCE` rows at a time, so that their shape does not depend on how blocks are cut.
        """
        import torch

        width = len(self.operators[0])
        rows = [model.double().reshape(-1, width) for model in inputs.models]
        total = sum(self.weights)
        mean = sum(w * theta for w, theta in zip(self.weights, rows, strict=True)) / total
        assert isinstance(mean, torch.Tensor)
        for first in range(0, len(mean), ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            start = mean[some].clone()
            for theta, operator in zip(rows, self.operators, strict=True):
                # A non-finite value shows at its own element only; the rest of its row uses the average in its place.
                away = (theta[some] - start).nan_to_num(0.0, 0.0, 0.0)
                mean[some] += away @ operator.to(theta.device)
        return mean.reshape(-1)
