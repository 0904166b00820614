"""Isotropic merging: the summed task vectors with equal singular values.  https://arxiv.org/abs/2502.04959"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from streammerge.algebra.polar import polar, polar_bytes
from streammerge.algebra.rules import Rule
from streammerge.algebra.rules.matrix_merge import Deltas, each, total_of
from streammerge.algebra.spectral import svd, svd_bytes
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.steps import merge_matrices
from streammerge.methods.tensor_context import TensorContext

if TYPE_CHECKING:
    import torch

_PAPER = "Marczak et al. 2025, https://arxiv.org/abs/2502.04959"


def _bytes_of_polar(context: TensorContext) -> int:
    assert context.matrix is not None
    return polar_bytes(*context.matrix)


def _bytes_with_bases(context: TensorContext) -> int:
    assert context.matrix is not None
    rows, columns = context.matrix
    return svd_bytes(rows, columns) + 8 * min(rows, columns) * (rows + columns)


@method(
    "iso_c", cost=33, access="tensor", base="required", matrices=True, workspace=_bytes_of_polar, paper=_PAPER
)
def iso_c(context: TensorContext, *, weight: PerModel[float] = per_model(1.0), lambda_: float = 1.0) -> Rule:
    """The sum of the task vectors with all singular values set to their mean: theta = theta_0 + lambda * mean(S) U V'.

    U S V' is the singular value decomposition of a matrix of sum_i delta_i, in fp64. The mean is over all min(rows,
    columns) values. If the sum is rank-deficient, U V' is restricted to its numerical rank (the published code picks arbitrary
    vectors beyond it). Tensors that are not matrices get the mean of the task vectors.
    """
    return merge_matrices(context, weight, isotropic, lambda_)


def isotropic(deltas: Deltas) -> torch.Tensor:
    """Return mean(S) U V' of the sum of the matrices."""
    factor, total = polar([total_of(deltas)])
    return factor.mul_(total / min(deltas.shape))


@method(
    "iso_cts",
    cost=180,
    access="tensor",
    base="required",
    matrices=True,
    workspace=_bytes_with_bases,
    bounds={"common_fraction": (0.0, 1.0)},
    paper=_PAPER,
)
def iso_cts(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    common_fraction: float = 0.8,
    lambda_: float = 1.0,
) -> Rule:
    """Iso-C in which each model's own directions replace the sum's smallest: theta = theta_0 + lambda * mean(S) U V'.

    Of the r = min(rows, columns) directions of the sum of T task vectors, the k largest are kept, about `common_fraction` * r.
    Each model adds the t = round((r - k) / T) largest of its own delta_i, without its part in the span of the k left vectors;
    k is r - T t. U and V are the nearest orthogonal matrices to all left and all right vectors, S has all their
    singular values. A direction that does not exist, for lack of rank, counts as a singular value of 0. Tensors that are
    not matrices get the mean of the task vectors.
    """
    return merge_matrices(context, weight, partial(isotropic_by_task, fraction=common_fraction), lambda_)


def isotropic_by_task(deltas: Deltas, *, fraction: float) -> torch.Tensor:
    """Return mean(S) U V' of the common and the models' own directions."""
    import torch

    rank = min(deltas.shape)
    own = min(round((rank - fraction * rank) / len(deltas)), rank // len(deltas))
    common = svd([total_of(deltas)], rank - own * len(deltas))
    found = [common]
    for delta in each(deltas) if own else ():
        delta -= common.left @ (common.left.T @ delta)
        owned = [delta]
        del delta
        found.append(svd(owned, own))
    total = sum(float(one.values.sum()) for one in found)
    left, right = ([getattr(one, side) for one in found] for side in ("left", "right"))
    del common, found
    factors = []
    for sides in (left, right):
        joined = [torch.cat(sides, dim=1)]
        sides.clear()
        factors.append(polar(joined).factor)
    return (factors[0] @ factors[1].T).mul_(total / rank)
