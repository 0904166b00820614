"""A plain torch function of tensors as a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any

from streammerge.algebra.rules.base import Inputs, Rule
from streammerge.algebra.task_vectors import TaskVector
from streammerge.records import dataclass

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Formula(Rule):
    """A plain torch function of the blocks, such as a user's own method."""

    function: Callable[..., Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    vectors: tuple[TaskVector, ...] = ()
    """The task vectors after a drop, if any, as in `FisherMean`."""
    method: str = ""
    """The name of the method, for messages."""

    def merged(self, inputs: Inputs) -> torch.Tensor:
        """Return the function's result: a floating-point tensor of the blocks' shape."""
        return self.function(list(inputs.models), inputs.base, **self.parameters)

    def dropped(self, inputs: Inputs) -> list[torch.Tensor]:
        """Return the models that the function is given, in the dtype of the blocks."""
        models, base, where, _ = inputs
        if not self.vectors or base is None:
            return list(models)
        pairs = zip(self.vectors, models, strict=True)
        return [vector.dropped_model(theta, base, where).to(theta.dtype) for vector, theta in pairs]
