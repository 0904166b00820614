"""The Karcher mean: the point on the sphere closest to all models' directions, at their mean length."""

from __future__ import annotations

import numpy as np

from streammerge.algebra.extent import Extent
from streammerge.errors import ConfigError
from streammerge.methods.gram_space import Combination, Matrix, combine, cosines, lengths
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.tensor_context import TensorContext


@method(
    "karcher",
    cost=2,
    access=Extent.TENSOR,
    base="member",
    bounds={"tol": (0.0, 1.0), "max_iter": (1, 10_000)},
    paper="Karcher 1977, https://doi.org/10.1002/cpa.3160300502",
)
def karcher(
    context: TensorContext, *, weight: PerModel[float] = per_model(1.0), max_iter: int = 10, tol: float = 1e-5
) -> Combination:
    """Riemannian mean of the models' directions on the sphere, times their mean length; each tensor is one vector.

    u <- exp_u(sum_i a_i log_u u_i), starting at the normalised mean, until a step is shorter than `tol` or `max_iter`
    steps are done. All iterates lie in the span of the models, so only their coefficients are iterated. A base counts
    as one more model.
    """
    if context.dropped:
        raise ConfigError(
            "`karcher` averages whole models, so no drop can come before it: remove `drop_rate`"
        )
    total = sum(weight)
    if not total > 0 or min(weight) < 0:
        raise ConfigError(f"the weights sum to {total:g}: karcher needs weights of 0 or more, not all 0")
    weights = tuple(w / total for w in weight)
    return combine(sphere_mean, n=context.n_models, weights=weights, max_iter=max_iter, tol=tol)


def sphere_mean(gram: Matrix, *, weights: tuple[float, ...], max_iter: int, tol: float) -> Matrix:
    """Return the weights (rows, k) of the Karcher mean of the directions, at the mean length."""
    norm, cosine = lengths(gram), cosines(gram)
    return np.stack([_one(n, c, np.array(weights), max_iter, tol) for n, c in zip(norm, cosine, strict=True)])


def _one(norm: Matrix, cosine: Matrix, weights: Matrix, max_iter: int, tol: float) -> Matrix:
    """Return the weights of one row. `u` holds the coefficients of the current iterate in the unit vectors."""
    there = norm > 0
    if not there.any():
        return np.zeros_like(norm)
    share = np.where(there, weights, 0.0)
    share = share / share.sum() if share.sum() > 0 else share

    def unit(u: Matrix) -> Matrix:
        length = np.sqrt(max(float(u @ cosine @ u), 0.0))
        return u / length if length > tol else np.eye(len(u))[int(np.argmax(there))]

    u = unit(share)
    for _ in range(max_iter):
        dots = np.clip(cosine @ u, -1.0, 1.0)
        angle = np.arccos(dots)
        near = (angle < tol) | (np.sin(angle) < 1e-12)
        factor = np.where(near, 0.0, share * angle / np.where(near, 1.0, np.sin(angle)))
        step = factor - float(factor @ dots) * u
        length = np.sqrt(max(float(step @ cosine @ step), 0.0))
        if length < tol:
            break
        u = unit(np.cos(length) * u + np.sin(length) * step / length)
    scale = float(weights @ norm)
    return np.where(there, scale * u / np.where(there, norm, 1.0), 0.0)
