"""Calls of methods on a few elements, for tables that are computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from streammerge.algebra.rules import CopyOf, Rule
from streammerge.algebra.task_vectors import Where
from streammerge.methods.registry import get_method
from streammerge.methods.tensor_context import TensorContext
from streammerge.numerics.philox import RandomKeys

KEYS = RandomKeys(0, ("a", "b", "c"))


BASE = [1.0, 2.0, 3.0, 4.0]


DELTAS = [
    [0.5, -0.25, 0.125, 0.0625],
    [0.25, 0.5, -0.125, -1.0],
    [-1.0, 0.125, 0.25, 0.75],
]


def call(
    rule: Rule,
    deltas: Sequence[Sequence[float]],
    base: Sequence[float] = BASE,
    seed: int = 0,
    start: int = 0,
) -> list[float]:
    """Apply a rule to base + deltas, in fp32 as the engine does."""
    assert not isinstance(rule, CopyOf)
    theta_0 = torch.tensor(base)
    models = [theta_0 + torch.tensor(delta) for delta in deltas]
    merged = rule(models, theta_0, Where("t", start, RandomKeys(seed, KEYS.models)))
    assert merged.dtype == torch.float64
    return merged.tolist()


def parameters_of(name: str, n: int, **given: Any) -> dict[str, Any]:
    """Every declared parameter, as the planner binds it: `given`, else the default."""
    bound = {}
    for parameter in get_method(name).parameters.values():
        value = given.get(parameter.name, parameter.default)
        if parameter.per_model and not isinstance(value, tuple):
            value = (value,) * n
        bound[parameter.name] = value
    return bound


def follow(name: str, n: int, *answers: list[Any], **given: Any) -> Any:
    return get_method(name).start(TensorContext(n), parameters_of(name, n, **given), answers)
