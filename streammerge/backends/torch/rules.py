"""Implementations of rules that are not a plain formula of the inputs; all other rules are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from streammerge.algebra.gram_matrix import full_matrices
from streammerge.algebra.rules import ColumnCombination, Formula, Inputs, RowCombination, Rule, Scaled
from streammerge.backends.torch.device_block import DeviceBlock
from streammerge.backends.torch.sums import dot_products
from streammerge.errors import InputError, blamed_on, printable

if TYPE_CHECKING:
    import torch

_Compute = TypeVar("_Compute", bound="Callable[[DeviceBlock, Any, Inputs], torch.Tensor]")

_RULES: dict[type[Rule], Callable[[DeviceBlock, Any, Inputs], torch.Tensor]] = {}


def _computes(rule: type[Rule]) -> Callable[[_Compute], _Compute]:
    def register(function: _Compute) -> _Compute:
        _RULES[rule] = function
        return function

    return register


def merged_by(rule: Rule, on: DeviceBlock, inputs: Inputs) -> torch.Tensor:
    """Return a rule's result for flat inputs, flat."""
    own = _RULES.get(type(rule))
    return rule(*inputs) if own is None else own(on, rule, inputs)


@_computes(ColumnCombination)
def _combine_columns(on: DeviceBlock, rule: ColumnCombination, inputs: Inputs) -> torch.Tensor:
    import torch

    weights = torch.from_numpy(rule.weights).to(on.device)
    return rule.combined(_by_rows(inputs, on.block.row_length), weights).reshape(-1)


@_computes(RowCombination)
def _combine_rows(on: DeviceBlock, rule: RowCombination, inputs: Inputs) -> torch.Tensor:
    import torch

    length = on.block.row_length
    k = len(rule.vectors) or len(inputs.models) + (inputs.base is not None)
    pairs = dot_products(rule.vectors, inputs, length)
    weights = np.ascontiguousarray(rule.coefficients(full_matrices(pairs, k)))
    rows = _by_rows(inputs, length)
    return rule.combined(rows, torch.from_numpy(weights).to(on.device)).reshape(-1)


@_computes(Scaled)
def _scale(on: DeviceBlock, rule: Scaled, inputs: Inputs) -> torch.Tensor:
    return rule.moved(merged_by(rule.rule, on, inputs), inputs.theta_0)


def _by_rows(inputs: Inputs, length: int) -> Inputs:
    models = [model.reshape(-1, length) for model in inputs.models]
    base = None if inputs.base is None else inputs.base.reshape(-1, length)
    return inputs._replace(models=models, base=base)


@_computes(Formula)
def _call_formula(on: DeviceBlock, rule: Formula, inputs: Inputs) -> torch.Tensor:
    import torch

    block, base = on.block, inputs.base
    shape = block.shape if len(block.shape) != 1 else (-1,)
    if on.at_once and len(shape) > 1:
        shape = (-1, shape[-1])
    shaped = [model.reshape(shape) for model in rule.dropped(inputs)]
    with blamed_on(rule.method, block.tensor):
        merged = rule(shaped, None if base is None else base.reshape(shape), inputs.where)
    what: str | None = None
    if not isinstance(merged, torch.Tensor) or merged.shape != shaped[0].shape:
        found = tuple(merged.shape) if isinstance(merged, torch.Tensor) else type(merged).__name__
        what = f"{found}, not a tensor of shape {tuple(shaped[0].shape)}"
    elif not merged.dtype.is_floating_point:
        what = f"{str(merged.dtype).removeprefix('torch.')} numbers, not floating-point numbers: call .float() on them"
    if what is not None:
        name, tensor = printable(rule.method), printable(block.tensor)
        raise InputError(f"method {name!r}: tensor {tensor}: returned {what}")
    return merged.detach().reshape(-1)
