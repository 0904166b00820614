"""The diagonal as its definition says, with the whole model in memory: the oracle of `fisher compute`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

Terms = Callable[[Tensor, Tensor, dict[str, Any]], Iterator[tuple[float, Tensor]]]
"""From log-probabilities, tokens and the line: pairs of a weight and the log-likelihood whose gradient is squared."""


def of_tokens(log_p: Tensor, ids: Tensor, line: dict[str, Any]) -> Iterator[tuple[float, Tensor]]:
    """Yield the log-likelihood of a language model's own sequence."""
    yield 1.0, log_p[0, :-1].gather(1, ids[0, 1:, None]).sum()


def of_label(log_p: Tensor, ids: Tensor, line: dict[str, Any]) -> Iterator[tuple[float, Tensor]]:
    """Yield the log-likelihood of the line's label."""
    yield 1.0, log_p[0, line["label"]]


def of_every_label(log_p: Tensor, ids: Tensor, line: dict[str, Any]) -> Iterator[tuple[float, Tensor]]:
    """Yield the log-likelihoods of all labels, with their probabilities."""
    for one in log_p[0]:
        yield float(one.detach().exp()), one


def of_every_token(log_p: Tensor, ids: Tensor, line: dict[str, Any]) -> Iterator[tuple[float, Tensor]]:
    """Yield the log-likelihoods of all tokens at all positions, with their probabilities: the expectation."""
    for position in log_p[0, :-1]:
        for one in position:
            yield float(one.detach().exp()), one


def diagonal(model: Any, lines: Sequence[dict[str, Any]], terms: Terms) -> dict[str, Tensor]:
    """Return the mean over examples of the squared gradients, fp64, by the names that a checkpoint has.

    Everything is fp64, but for experts, whose fused product transformers has in fp32 only.
    """
    if not hasattr(model.config, "num_local_experts"):
        model = model.double()
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    for line in lines:
        ids = torch.tensor(line["input_ids"])[None]
        log_p = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.log_softmax(-1)
        for weight, term in terms(log_p, ids, line):
            gradients = torch.autograd.grad(
                term, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    sums[name] += weight * gradient.double().square()
    means: dict[str, Tensor] = revert_weight_conversion(model, {n: s / len(lines) for n, s in sums.items()})
    return means


def worst_difference(found: dict[str, Any], expected: dict[str, Tensor]) -> float:
    """Return the largest |found - expected| / (expected + mean over the model).

    The mean is there because a gradient that is 0 but for rounding (of an attention's key bias) is noise in any precision.
    """
    assert set(found) == set(expected)
    mean = float(sum(f.sum() for f in expected.values()) / sum(f.numel() for f in expected.values()))
    return max(
        float(((torch.as_tensor(found[name]).double() - f).abs() / (f + mean)).max())
        for name, f in expected.items()
    )
