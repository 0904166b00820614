"""RAM: keep what one model alone has learnt whole, and average what several have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.methods.registry import method

if TYPE_CHECKING:
    import torch


@method(
    "ram",
    base="required",
    bounds={"epsilon": (0.0, float("inf"))},
    paper="Yuan et al. 2026, https://arxiv.org/abs/2601.13572",
)
def ram(models: list[torch.Tensor], base: torch.Tensor, *, epsilon: float = 1e-5) -> torch.Tensor:
    """theta = theta_0 + the mean of the deltas above `epsilon` in magnitude, over the models that have one there.

    An element that one model alone has touched takes its whole delta; one that none has stays the base's.
    """
    total = base.new_zeros(base.shape).double()
    touched = total.clone()
    for theta in models:
        delta = theta - base
        counts = ~(delta.abs() <= epsilon)  # a NaN counts: it must show
        total = total + delta.double().masked_fill(~counts, 0.0)
        touched = touched + counts
    return base.double() + total / touched.clamp(min=1.0)
