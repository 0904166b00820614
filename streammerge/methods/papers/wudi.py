"""WUDI merging in closed form: the least interference with each task vector's rows.  https://arxiv.org/abs/2503.08099"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from streammerge.algebra.rules import Rule
from streammerge.algebra.rules.matrix_merge import Deltas, each
from streammerge.algebra.spectral import packed_bytes, solved
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.steps import merge_matrices
from streammerge.methods.tensor_context import TensorContext

if TYPE_CHECKING:
    import torch


def _workspace(context: TensorContext) -> int:
    """Return the bytes: a delta, the sum and a product; the Gram matrix, the sum, its eigenvectors and the solver's work."""
    assert context.matrix is not None
    rows, columns = context.matrix
    return 8 * (3 * rows * columns + 5 * columns * columns) + packed_bytes(rows, columns)


@method(
    "wudi",
    cost=20,
    access="tensor",
    base="required",
    matrices=True,
    workspace=_workspace,
    bounds={"alpha": (0.0, 1.0), "ridge": (0.0, float("inf"))},
    paper="Cheng et al. 2025, https://arxiv.org/abs/2503.08099",
)
def wudi(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    alpha: float = 1.0,
    ridge: float = 0.0,
    lambda_: float = 1.0,
) -> Rule:
    """Interference with no data: the tau that minimises sum_i |(tau - delta_i) delta_i'|^2 / |delta_i|^2, in fp64.

    It is theta_0 + lambda * (sum_i delta_i G_i / n_i) (sum_i G_i / n_i)^+ with G_i = delta_i' delta_i and n_i its trace: RegMean
    with each task vector's rows in place of inputs. `alpha` multiplies the entries of G_i off the diagonal; `ridge`, relative
    to the mean of the diagonal, is added to the diagonal of the sum. The inverse is restricted to the numerical rank. (The
    published code takes 300 steps of Adam from sum_i delta_i, and stays near that start outside of the rows' span.) Tensors that
    are not matrices get the mean of the task vectors.
    """
    return merge_matrices(context, weight, partial(least_interference, alpha=alpha, ridge=ridge), lambda_)


def least_interference(deltas: Deltas, *, alpha: float, ridge: float) -> torch.Tensor:
    """Return the minimiser; 0 if all matrices are 0."""
    import torch

    columns = deltas.shape[1]
    total, product = (
        torch.zeros(shape, dtype=torch.float64, device=deltas.device)
        for shape in ((columns, columns), deltas.shape)
    )
    for delta in each(deltas):
        gram = delta.T @ delta
        trace = float(gram.diagonal().sum())
        if not trace:
            continue
        diagonal = gram.diagonal() / trace
        gram *= alpha / trace
        gram.diagonal().copy_(diagonal)
        product += delta @ gram
        total += gram
    total.diagonal().add_(ridge * total.diagonal().mean())
    return solved([product], [total], deltas.shape)
