"""TSV-M: the largest singular vectors of each task vector, made orthogonal.  https://arxiv.org/abs/2412.00081"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.algebra.polar import polar
from streammerge.algebra.rules import Rule
from streammerge.algebra.rules.matrix_merge import Deltas, each
from streammerge.algebra.spectral import Svd, svd, svd_bytes
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.steps import merge_matrices
from streammerge.methods.tensor_context import TensorContext

if TYPE_CHECKING:
    import torch


def vectors_each(rank: int, n_models: int) -> int:
    """Return the number of singular vectors that each model keeps: its share of the rank, at least 1.

    >>> vectors_each(10, 3), vectors_each(1, 3)
    (3, 1)
    """
    return max(1, rank // n_models)


def _workspace(context: TensorContext) -> int:
    assert context.matrix is not None
    rows, columns = context.matrix
    kept = context.n_models * vectors_each(min(rows, columns), context.n_models)
    return svd_bytes(rows, columns) + 8 * kept * (rows + columns)


@method(
    "tsv_m",
    cost=140,
    access="tensor",
    base="required",
    matrices=True,
    workspace=_workspace,
    paper="Gargiulo et al. 2025, https://arxiv.org/abs/2412.00081",
)
def tsv_m(context: TensorContext, *, weight: PerModel[float] = per_model(1.0), lambda_: float = 1.0) -> Rule:
    """Task singular vectors: theta = theta_0 + lambda * U diag(S) V', in fp64.

    Each of T models keeps the k = floor(min(rows, columns) / T) largest singular values of its delta_i (at least 1, and at
    most its numerical rank). S has all of them; U and V are the nearest orthogonal matrices to all left and all right vectors
    (Procrustes), on the numerical rank of these. Tensors that are not matrices get the mean of the task vectors.
    """
    return merge_matrices(context, weight, task_singular_vectors, lambda_)


def task_singular_vectors(deltas: Deltas) -> torch.Tensor:
    """Return U diag(S) V' of the models' largest singular vectors, made orthogonal."""
    import torch

    rows, columns = deltas.shape
    k, n = vectors_each(min(deltas.shape), len(deltas)), len(deltas)
    left, right, values = (
        torch.empty((*lines, k * n), dtype=torch.float64, device=deltas.device)
        for lines in ((rows,), (columns,), ())
    )
    at = 0
    for delta in each(deltas):
        owned = [delta]
        del delta
        found: Svd = svd(owned, k)
        end = at + len(found.values)
        left[:, at:end], values[at:end], right[:, at:end] = found
        at = end
        del found
    outer, inner = [left[:, :at]], [right[:, :at]]
    del left, right
    return (polar(outer).factor * values[:at]) @ polar(inner).factor.T
