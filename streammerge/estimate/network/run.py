"""Run the stages of a model separately: the part before the layers, each layer, and the part after the layers.

The model's own forward runs with its layers replaced. A replaced first layer captures its inputs and stops the run. If
all layers are replaced by ones that pass on their inputs, each layer's other arguments (masks, position embeddings) are
captured, and the part after the layers continues from hidden states that are supplied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from streammerge.errors import ModelError, printable
from streammerge.estimate.network.examples import Example
from streammerge.estimate.network.live import Live, Weights
from streammerge.estimate.network.skeleton import Skeleton
from streammerge.records import dataclass

_HIDDEN = "hidden_states"


@dataclass(frozen=True)
class Call:
    """The inputs of a layer."""

    hidden: Tensor
    args: tuple[Any, ...]
    """The arguments except the hidden states."""
    kwargs: Mapping[str, Any]


class _Reached(Exception):
    """Ends a model's forward early."""


class Network:
    """Runs the stages of a model.

    Raises
    ------
    ModelError
        If the model is not a plain stack: layers run more than once, out of order, or with other modules in between.
    """

    def __init__(self, skeleton: Skeleton, device: torch.device) -> None:
        self.skeleton = skeleton
        self._device = device
        self._model = skeleton.model
        for _, module in self._model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self._forwards = [block.forward for block in skeleton.blocks]
        self._enter: Callable[[int, Call], Any] = _not_running
        for i, block in enumerate(skeleton.blocks):
            block.forward = partial(self._on_block, i)
        self._blank = Weights(device)
        self._in_tuple = False
        self._in_tuple = self._find_structure()
        self._last: tuple[int, int, Call] | None = None

    @property
    def n_blocks(self) -> int:
        """Number of layers."""
        return len(self._forwards)

    def width(self, example: Example) -> int:
        """Return the elements of a hidden state, per token."""
        return self.call(0, example).hidden.numel() // example.length

    def embed(self, example: Example, weights: Weights) -> Tensor:
        """Return the input of the first layer, [1, tokens, width]."""
        caught: list[Call] = []

        def enter(i: int, call: Call) -> Any:
            caught.append(call)
            raise _Reached

        self._run(example, weights, enter)
        return caught[0].hidden

    def call(self, i: int, example: Example) -> Call:
        """Return the arguments of layer `i`; for the hidden states only shape and dtype matter.

        They are cached for examples of the same length, on which alone they depend (`check_by_length`).
        """
        if self._last is None or self._last[:2] != (i, example.length):
            self._last = i, example.length, self._calls(example, i)[i]
        return self._last[2]

    def block(self, i: int, hidden: Tensor, call: Call, weights: Weights) -> Tensor:
        """Return the output of layer `i` for hidden states."""
        with Live(weights):
            result = self._forwards[i](hidden, *call.args, **call.kwargs)
        self._in_tuple = isinstance(result, tuple)
        return result[0] if self._in_tuple else result

    def head(self, example: Example, hidden: Tensor, weights: Weights) -> Tensor:
        """Return the logits for the last layer's output, [1, tokens or labels, ...]."""
        live = Live(self._blank)
        passed = 0

        def enter(i: int, call: Call) -> Any:
            nonlocal passed
            if i != passed:
                raise self._refuse("its layers do not run once each, in order")
            passed += 1
            if passed < self.n_blocks:
                return self._hand_on(call.hidden)
            live.weights = weights
            return self._hand_on(hidden)

        logits: Tensor = self._run(example, self._blank, enter, live).logits
        return logits

    def check_by_length(self, example: Example, other: Example) -> None:
        """Refuse a model whose layers' arguments differ between two examples of the same length.

        Raises
        ------
        ModelError
            If they differ; the message names the argument.
        """
        for a, b in zip(self._calls(example), self._calls(other), strict=True):
            for name in a.kwargs:
                if isinstance(a.kwargs[name], Tensor) and not torch.equal(a.kwargs[name], b.kwargs[name]):
                    raise self._refuse(f"its layers take {name}, which depends on more than the length")

    def _calls(self, example: Example, last: int | None = None) -> list[Call]:
        """Return the arguments of each layer up to `last`."""
        calls: list[Call] = []

        def enter(i: int, call: Call) -> Any:
            if i != len(calls):
                raise self._refuse(
                    f"its layers do not run once each, in order ({len(calls)} is followed by {i})"
                )
            calls.append(call)
            if i == (self.n_blocks - 1 if last is None else last):
                raise _Reached
            return self._hand_on(call.hidden)

        with torch.no_grad():
            self._run(example, self._blank, enter)
        for call in calls:
            for name, value in call.kwargs.items():
                if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
                    raise self._refuse(f"its layers take {name}, which depends on the embeddings")
        return calls

    def _find_structure(self) -> bool:
        """Return whether layers return tuples, by checking whether a returned tensor reaches the next layer unchanged."""
        import numpy as np

        probe = Example(0, np.zeros(3, np.int64))
        if self.n_blocks == 1:
            return False  # a single layer: its structure is known once it has run
        for in_tuple in (False, True):
            self._in_tuple = in_tuple
            try:
                calls = self._calls(probe)
            except ModelError:
                raise
            except Exception:  # a model may do anything with a result of the wrong kind
                continue
            if all(call.hidden is calls[0].hidden for call in calls):
                return in_tuple
        raise self._refuse(
            "its layers do not follow each other directly, hidden states in, hidden states out"
        )

    def _hand_on(self, hidden: Tensor) -> Any:
        return (hidden,) if self._in_tuple else hidden

    def _on_block(self, i: int, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self._enter(i, Call(args[0], args[1:], kwargs))
        hidden = kwargs.pop(_HIDDEN)
        return self._enter(i, Call(hidden, (), kwargs))

    def _run(
        self, example: Example, weights: Weights, enter: Callable[[int, Call], Any], live: Live | None = None
    ) -> Any:
        ids = torch.from_numpy(example.ids)[None].to(self._device)
        self._enter = enter
        try:
            with live or Live(weights):
                return self._model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except _Reached:
            return None
        finally:
            self._enter = _not_running

    def _refuse(self, what: str) -> ModelError:
        return ModelError(
            f"{printable(self.skeleton.reference)}: {type(self._model).__name__} cannot be run layer by layer: {what}"
        )


def _not_running(i: int, call: Call) -> Any:
    raise AssertionError(i)
