"""Subspace boosting of a merged model: raise its small singular values.  https://arxiv.org/abs/2506.16506"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from streammerge.algebra.rules import Rule
from streammerge.algebra.rules.matrix_merge import Deltas
from streammerge.algebra.spectral import svd, svd_bytes
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.steps import correct_matrices
from streammerge.methods.tensor_context import TensorContext

if TYPE_CHECKING:
    import torch


def _workspace(context: TensorContext) -> int:
    assert context.matrix is not None
    return svd_bytes(*context.matrix)


@method(
    "subspace_boosting",
    cost=51,
    access="tensor",
    base="required",
    matrices=True,
    workspace=_workspace,
    bounds={"beta": (0.0, 1.0)},
    paper="Skorobogat et al. 2025, https://arxiv.org/abs/2506.16506",
)
def subspace_boosting(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    beta: float = 0.01,
    lambda_: float = 1.0,
) -> Rule:
    """Raise the small singular values of a merged model, the first of `models`: theta = theta_0 + lambda * U diag(S*) V'.

    U S V' is the first delta, in fp64. S* raises every singular value to the one at which the sum of the largest reaches the
    fraction `beta` of the sum of all; they are restricted to the numerical rank. (In small matrices the largest is more than
    the default 0.01 of the sum, so all become equal.) Further models are not used. Tensors that are not matrices stay as merged.
    """
    return correct_matrices(context, weight, partial(boosted, beta=beta), lambda_)


def boosted(deltas: Deltas, *, beta: float) -> torch.Tensor:
    """Return the first matrix with its small singular values raised."""
    left, values, right = svd([deltas[0]])
    if len(values):
        sums = values.cumsum(0)
        place = int((sums < beta * sums[-1]).sum())
        values = values.clamp(min=float(values[min(place, len(values) - 1)]))
    return (left * values) @ right.T
