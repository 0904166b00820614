"""Multi-SLERP: the mean direction of several models, at their mean length."""

from __future__ import annotations

import numpy as np

from streammerge.algebra.extent import Extent
from streammerge.errors import ConfigError
from streammerge.methods.gram_space import Combination, Matrix, combine, cosines, lengths
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.tensor_context import TensorContext


@method(
    "multislerp",
    cost=1.8,
    access=Extent.TENSOR,
    base="optional",
    bounds={"eps": (0.0, 1.0)},
    ignored={"int8_mask": "it has no effect on the numbers"},
    paper="https://github.com/arcee-ai/mergekit (method of its own)",
)
def multislerp(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Combination:
    """Weighted mean direction times weighted mean length of the models, or of their task vectors if there is a base.

    theta = (sum_i w_i |v_i|) M / |M|, M = sum_i w_i v_i / |v_i|; each tensor is one vector. mergekit adds a tangent
    step from M, which is identically zero: the weighted sum of the tangents is M - |M| (M / |M|). Where the directions
    cancel (|M| < `eps`), the weighted sum of the vectors is used (mergekit does so for two models, and fails for more).
    """
    total = sum(weight)
    if normalize_weights and not abs(total) > 0:
        raise ConfigError(f"the weights sum to {total:g}: use different weights, or normalize_weights: false")
    weights = tuple(w / total for w in weight) if normalize_weights else tuple(weight)
    vectors = context.task_vectors((1.0,) * context.n_models) if context.has_base else ()
    if context.dropped and not vectors:
        raise ConfigError("a drop needs a base model; set `base_model`")
    return combine(mean_direction, n=context.n_models, vectors=vectors, weights=weights, eps=eps)


def mean_direction(gram: Matrix, *, weights: tuple[float, ...], eps: float) -> Matrix:
    """Return the weights (rows, k) of sum_i w_i v_i / |v_i|, scaled to the length sum_i w_i |v_i|."""
    w, norm = np.array(weights), lengths(gram)
    if len(w) == 1:
        return np.ones_like(norm)
    mean = np.sqrt(np.maximum(np.einsum("i,rij,j->r", w, cosines(gram), w), 0.0))
    cancel = mean < eps
    unit = w / np.where(norm > 0, norm, np.inf)
    scale = (norm @ w) / np.where(cancel, 1.0, mean)
    return np.where(cancel[:, None], w, unit * scale[:, None])
