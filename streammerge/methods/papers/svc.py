"""Singular value calibration of a merged model: undo over-counted directions.  https://arxiv.org/abs/2602.05536"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from streammerge.algebra.rules import Rule
from streammerge.algebra.rules.matrix_merge import Deltas
from streammerge.algebra.spectral import cutoff, svd, svd_bytes
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.steps import correct_matrices
from streammerge.methods.tensor_context import TensorContext

if TYPE_CHECKING:
    import torch


def _workspace(context: TensorContext) -> int:
    """Return the bytes: the decomposition; then both factors, a delta, its rows along the vectors, and a product."""
    assert context.matrix is not None
    rows, columns = context.matrix
    return svd_bytes(rows, columns) + 16 * rows * columns


@method(
    "svc",
    cost=48,
    access="tensor",
    base="required",
    models=(2, None),
    matrices=True,
    workspace=_workspace,
    bounds={"alpha": (1e-9, float("inf"))},
    paper="Li et al. 2026, https://arxiv.org/abs/2602.05536",
)
def svc(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    alpha: float = 0.1,
    lambda_: float = 1.0,
) -> Rule:
    """Calibrate the singular values of a merged model, the first of `models`, by the models that it was merged from.

    theta = theta_0 + lambda * U diag(gamma * S) V' with U S V' the first delta, delta_m, in fp64. For the direction u_r, gamma_r
    is T / sum_i max(`alpha`, s_i), where s_i = <u_r' delta_m, u_r' delta_i> / |u_r' delta_i|^2 says how often delta_m contains
    what model i has there. Models that have nothing in a direction are left out of its sum and of T. Tensors that are not
    matrices stay as merged.
    """
    return correct_matrices(context, weight, partial(calibrated, alpha=alpha), lambda_)


def calibrated(deltas: Deltas, *, alpha: float) -> torch.Tensor:
    """Return the first matrix with calibrated singular values."""
    import torch

    left, values, right = svd([deltas[0]])
    counted, taking = torch.zeros_like(values), torch.zeros_like(values)
    for model in range(1, len(deltas)):
        delta = deltas[model]
        noise = cutoff(float(torch.linalg.vector_norm(delta)), deltas.shape)
        rows = left.T @ delta
        del delta
        squares = rows.square().sum(dim=1)
        takes = squares > noise**2
        shares = values * (rows * right.T).sum(dim=1) / torch.where(takes, squares, 1.0)
        counted += torch.where(takes, shares.clamp(min=alpha), 0.0)
        taking += takes
    gammas = torch.where(taking > 0, taking / torch.where(taking > 0, counted, 1.0), 1.0)
    return (left * (gammas * values)) @ right.T
