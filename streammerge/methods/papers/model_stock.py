"""Model Stock: how far to go from the base towards the mean of fine-tunes, from the angle between them."""

from __future__ import annotations

import numpy as np

from streammerge.algebra.extent import Extent
from streammerge.methods.gram_space import Combination, Matrix, combine, cosines
from streammerge.methods.registry import method
from streammerge.methods.tensor_context import TensorContext


@method(
    "model_stock",
    cost=1.6,
    access=Extent.TENSOR,
    base="required",
    models=(2, None),
    ignored={"int8_mask": "it has no effect on the numbers"},
    paper="Jang et al. 2024, https://arxiv.org/abs/2403.19522",
)
def model_stock(context: TensorContext, *, filter_wise: bool = False, clamp: bool = False) -> Combination:
    """theta = theta_0 + t * mean of the task vectors, t = N c / (1 + (N - 1) c), c the cosine between task vectors.

    c is the mean over all pairs (the paper assumes one angle), for each tensor or, with `filter_wise`, for each row.
    c < 0 gives t < 0, which leads away from the models, unless `clamp` keeps t in [0, 1]. At the pole
    c = -1 / (N - 1) the result is the base.
    """
    vectors = context.task_vectors((1.0,) * context.n_models)
    by = Extent.ROW if filter_wise else Extent.TENSOR
    return combine(towards_mean, n=context.n_models, vectors=vectors, by=by, clamp=clamp)


def towards_mean(gram: Matrix, *, clamp: bool) -> Matrix:
    """Return the weights (rows, N) of the task vectors: t / N each (the paper's equation 5)."""
    n = gram.shape[1]
    pairs = cosines(gram)[:, *np.triu_indices(n, 1)]
    c = pairs.mean(axis=1)
    pole = 1.0 + (n - 1) * c
    t = np.where(np.abs(pole) < 1e-12, 0.0, n * c / np.where(np.abs(pole) < 1e-12, 1.0, pole))
    if clamp:
        t = np.clip(t, 0.0, 1.0)
    return np.repeat((t / n)[:, None], n, axis=1)
