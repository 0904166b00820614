"""SLERP: along the arc between two models (Shoemake 1985, "Animating rotation with quaternion curves")."""

from __future__ import annotations

from streammerge.algebra.extent import Extent
from streammerge.errors import ConfigError
from streammerge.methods.gram_space import Combination, arc, combine
from streammerge.methods.registry import method
from streammerge.methods.tensor_context import TensorContext


@method(
    "slerp",
    cost=1.3,
    access=Extent.TENSOR,
    base="required",
    models=(1, 1),
    presets={"mergekit": {"dot_threshold": 0.9995}},
    bounds={"dot_threshold": (0.0, 1.0)},
    paper="Shoemake 1985, https://doi.org/10.1145/325334.325242",
)
def slerp(context: TensorContext, *, t: float, dot_threshold: float = 1.0) -> Combination:
    """Spherical interpolation from the base (t = 0) to the other model (t = 1), each tensor as one vector.

    theta = (sin((1 - t) w) theta_0 + sin(t w) theta_1) / sin w, where w is the angle between them. The interpolation
    is linear where the cosine exceeds `dot_threshold` (mergekit: 0.9995, which fine-tunes of one base often exceed),
    or where the two are parallel.
    """
    if context.dropped:
        raise ConfigError(
            "`slerp` interpolates whole models, so no drop can come before it: use `nuslerp` with a base"
        )
    return combine(arc, n=1, base=True, t=t, dot_threshold=dot_threshold)
