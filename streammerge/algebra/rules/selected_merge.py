"""The mean of task vectors over elements that are selected by a score."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules.base import Inputs, Rule, zeros
from streammerge.algebra.scores import Selection
from streammerge.algebra.task_vectors import TaskVector
from streammerge.records import dataclass

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SelectedMerge(Rule):
    """theta = theta_0 + the weighted mean of those selected entries whose sign is that of their sum.

    The election is unweighted; weights enter the mean only (SCE, https://arxiv.org/abs/2408.07990).
    """

    vectors: tuple[TaskVector, ...]
    selection: Selection | None = None
    """The selected elements; None: all of them."""
    zero_sign: int = 0
    """The sign elected if the entries cancel: +1, or 0 for none (the base stays)."""
    floor: float = 0.0
    """The smallest divisor of the mean; smaller sums of agreeing weights are raised to it."""

    @property
    def extent(self) -> Extent:
        """ROW if the selection's score depends on whole rows, else ELEMENT."""
        by_rows = self.selection is not None and self.selection.score.sees_rows
        return Extent.ROW if by_rows else super().extent

    @property
    def removes(self) -> bool:
        """Whether entries may be dropped or not selected."""
        return self.selection is not None or super().removes

    def kept(self, inputs: Inputs) -> tuple[int, ...]:
        """Return the number of selected elements for each task vector; without a selection, of surviving entries."""
        models, base, where, _ = inputs
        if self.selection is None or base is None:
            return super().kept(inputs)
        return (int(self.selection.mask(models, base, where).sum()),) * len(self.vectors)

    def merged(self, inputs: Inputs) -> torch.Tensor:
        """Return theta for flat blocks."""
        import torch

        models, base, where = inputs.models, inputs.theta_0, inputs.where
        selected = self.selection.mask(models, base, where) if self.selection is not None else None
        up = zeros(base)
        down, up_sum, down_sum, up_weight, down_weight = (up.clone() for _ in range(5))
        for vector, theta in zip(self.vectors, models, strict=True):
            tau = vector.rescale * vector.surviving(theta, base, where).double()
            if selected is not None:
                tau = tau.masked_fill(~selected, 0.0)
            positive, negative = tau.clamp(min=0.0), (-tau).clamp(min=0.0)
            up, down = up + positive, down + negative
            up_sum, down_sum = up_sum + vector.weight * positive, down_sum + vector.weight * negative
            up_weight = up_weight + vector.weight * (tau > 0).double()
            down_weight = down_weight + vector.weight * (tau < 0).double()
        lead = (
            up - down
        )  # a NaN is not negative, so it joins the positive entries, where the check on the output finds it
        merged = torch.where(lead < 0, -down_sum, up_sum)
        if self.zero_sign == 0:
            merged = torch.where(lead == 0, 0.0, merged)
        weight = torch.where(lead < 0, down_weight, up_weight).clamp(min=self.floor)
        return base.double() + merged / torch.where(weight == 0, 1.0, weight)
