"""Copy one model, optionally scaled."""

from __future__ import annotations

from streammerge.algebra.rules import CopyOf, TaskVectorMerge, WeightedSum
from streammerge.errors import ConfigError
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.tensor_context import TensorContext


@method("passthrough", cost=1.5, base="none", models=(1, 1))
def passthrough(
    context: TensorContext, *, scale: PerModel[float | None] = per_model(None)
) -> CopyOf | WeightedSum | TaskVectorMerge:
    """Copy the tensors of one model, multiplied by `scale` if it is given."""
    (factor,) = scale
    if factor == 1.0:
        factor = None
    if context.dropped:
        if factor is not None:
            raise ConfigError("scale: cannot follow a drop: use `task_arithmetic` with lambda")
        return TaskVectorMerge(context.dropped)
    return CopyOf(0) if factor is None else WeightedSum((factor,))
