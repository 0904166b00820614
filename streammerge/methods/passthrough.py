"""One model, copied; optionally scaled."""

from __future__ import annotations

from streammerge.methods.recipes import CopyOf, WeightedSum
from streammerge.methods.registry import PerModel, Scope, method


@method("passthrough", base="none", models=(1, 1))
def passthrough(scope: Scope, *, scale: PerModel[float | None] = None) -> CopyOf | WeightedSum:  # type: ignore[assignment]
    """Copy the tensors of one model, times `scale` where it is given."""
    (factor,) = scale
    return CopyOf(0) if factor is None or factor == 1.0 else WeightedSum((factor,))
