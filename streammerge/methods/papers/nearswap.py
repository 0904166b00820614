"""NearSwap: take the second model's values where they are close to the base's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.methods.registry import method

if TYPE_CHECKING:
    import torch


@method(
    "nearswap",
    cost=7.3,
    base="required",
    models=(1, 1),
    paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
)
def nearswap(models: list[torch.Tensor], base: torch.Tensor, *, t: float) -> torch.Tensor:
    """theta = theta_0 + w (theta_1 - theta_0), w = t / |theta_1 - theta_0|, at most 1: no element moves further than t.

    Differences below 1e-6 count as 1e-6.
    """
    near, far = base.double(), models[0].double()
    weight = (t / (near - far).abs().clamp(min=1e-6)).clamp(0.0, 1.0)
    return weight * far + (1.0 - weight) * near
