"""Squares of gradients of weights that are used in unusual ways, against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from streammerge.errors import ModelError
from streammerge.estimate.fisher.gradients import Gradients
from streammerge.estimate.network.live import Live

CPU = torch.device("cpu")


class OneWeight:
    """A loader of a single parameter."""

    reference = "model"

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.absent = nn.Parameter(torch.empty(values.shape, device="meta"))

    def name(self, parameter: nn.Parameter) -> str:
        return "w"

    def load(self, parameter: nn.Parameter) -> Tensor:
        return self.values.clone()


def squares(use: Callable[[Tensor, Any], Tensor], n_scores: int = 1) -> tuple[Tensor, Tensor]:
    """Return the sums that `Gradients` finds for ``use(x, w)``, and autograd's."""
    torch.manual_seed(0)
    loader, x = OneWeight(torch.randn(5, 4)), torch.randn(1, 3, 4)
    hidden = x.clone().requires_grad_(True)
    weights = Gradients(loader, CPU, [loader.absent], "layer 0")  # type: ignore[arg-type]

    def run() -> Tensor:
        with Live(weights):
            return use(hidden * 1.0, loader.absent)

    output = weights.forward(run)
    scores = [torch.randn_like(output) for _ in range(n_scores)]
    weights.backward(output, scores, hidden)
    plain = loader.values.clone().requires_grad_(True)
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for score in scores:
        (gradient,) = torch.autograd.grad(use(x.clone(), plain), plain, score)
        expected += gradient.double().square()
    return weights.dense[loader.absent].sums, expected


USES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "once": lambda x, w: F.linear(x, w),
    "twice, one gradient": lambda x, w: F.linear(torch.tanh(x), w) + F.linear(x, w),
    "transposed": lambda x, w: torch.addmm(torch.zeros(4), F.linear(x, w).reshape(-1, 5), w),
    "by another function": lambda x, w: x @ w.T,
    "after another function": lambda x, w: F.linear(x, 1.0 + w.float()),
    "first linear, then otherwise": lambda x, w: F.linear(x, w) + w.sum(),
    "in a list": lambda x, w: F.linear(x, torch.cat([w, w])),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("n_scores", [1, 3])
def test_however_a_weight_is_used_its_squares_are_those_of_autograd(use: str, n_scores: int) -> None:
    found, expected = squares(USES[use], n_scores)
    assert torch.allclose(found, expected, rtol=1e-5)


def test_inputs_that_are_changed_in_place_are_refused() -> None:
    def use(x: Tensor, w: Any) -> Tensor:
        y = F.linear(x, w)
        x.mul_(2.0)
        return y + x.sum()

    with pytest.raises(ModelError, match="layer 0 changes the inputs of w in place"):
        squares(use)
