"""Supply a model's weights on demand: every call swaps meta-device parameters for live tensors.

A torch function mode intercepts each torch function before it runs. Weights are therefore read when they are first
needed, embeddings row by row, and callers can keep the inputs of linear maps, whatever the architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FACTS = {
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.__len__,
}
"""Attributes of a parameter that need no values, so the meta parameter answers them."""


class Weights:
    """Supplies the values that a live model requests. This base class reads nothing; it serves to trace a model.

    Parameters
    ----------
    device
        Device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def value(self, parameter: nn.Parameter) -> Tensor:
        """Return the tensor to compute with; here zeros that use no memory."""
        return torch.zeros((), device=self.device).expand(parameter.shape)

    def lookup(self, parameter: nn.Parameter, ids: Tensor, padding: int | None) -> Tensor:
        """Return the rows of an embedding for `ids`; here NaN, which marks everything that depends on them."""
        return torch.full((*ids.shape, parameter.shape[1]), torch.nan, device=self.device)

    def on_linear(self, parameter: nn.Parameter, inputs: Tensor, output: Tensor, transposed: bool) -> None:
        """Called after ``output = inputs @ parameter.T``, or ``inputs @ parameter`` if `transposed`."""

    def on_other(self, parameter: nn.Parameter) -> None:
        """Called when a parameter is passed to any other function that returns tensors."""


class Live(TorchFunctionMode):
    """While active, torch functions receive live tensors in place of meta parameters.

    Attributes
    ----------
    weights
        The supplier of values; it may be replaced between calls.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights = weights

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func` with live tensors."""
        kwargs = kwargs or {}
        if func is F.embedding and _is_absent(args[1]):
            return self._embedding(*args, **kwargs)
        if func in _FACTS and _is_absent(args[0]):
            return func(*args, **kwargs)
        if func == Tensor.device.__get__ and _is_absent(args[0]):
            return self.weights.device
        found: list[nn.Parameter] = []
        given = args
        args = tuple(self._swap(arg, found) for arg in args)
        if kwargs:
            kwargs = {key: self._swap(arg, found) for key, arg in kwargs.items()}
        result = func(*args, **kwargs)
        if found:
            matrix = _matrix_of(func, given)
            if matrix is not None:
                self.weights.on_linear(
                    matrix, args[0 if func is F.linear else 1], result, func is torch.addmm
                )
            if _holds_tensors(result):
                for parameter in found:
                    if parameter is not matrix:
                        self.weights.on_other(parameter)
        return result

    def _embedding(
        self, ids: Tensor, parameter: nn.Parameter, padding_idx: int | None = None, *rest: Any, **options: Any
    ) -> Tensor:
        if padding_idx is not None and padding_idx < 0:
            padding_idx += parameter.shape[0]
        return self.weights.lookup(parameter, ids, padding_idx)

    def _swap(self, arg: Any, found: list[nn.Parameter]) -> Any:
        if _is_absent(arg):
            found.append(arg)
            return self.weights.value(arg)
        if type(arg) in (list, tuple) and any(_is_absent(item) for item in arg):
            return type(arg)(self._swap(item, found) for item in arg)
        return arg


def _is_absent(value: Any) -> bool:
    return type(value) is nn.Parameter and value.is_meta


def _matrix_of(func: Callable[..., Any], args: tuple[Any, ...]) -> nn.Parameter | None:
    """Return the weight of a linear map; the argument before it is the input."""
    place = 1 if func is F.linear else 2 if func is torch.addmm else None
    if place is None or len(args) <= place or not _is_absent(args[place]):
        return None
    return args[place]


def _holds_tensors(result: Any) -> bool:
    if isinstance(result, list | tuple):
        return any(isinstance(item, Tensor) for item in result)
    return isinstance(result, Tensor)


def distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct ids, ascending, and each id's index among them."""
    found: tuple[Tensor, Tensor] = torch.unique(ids, return_inverse=True)
    return found
