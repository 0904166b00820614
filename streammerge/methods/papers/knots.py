"""KnOTS: TIES in the space that all task vectors' columns span.  https://arxiv.org/abs/2410.19735"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from streammerge.algebra.rules import Rule
from streammerge.algebra.rules.matrix_merge import Deltas, each
from streammerge.algebra.spectral import cutoff, packed_bytes
from streammerge.methods.registry import PerModel, method, per_model
from streammerge.methods.steps import merge_matrices
from streammerge.methods.tensor_context import TensorContext

if TYPE_CHECKING:
    import torch

_LEAST = 1e-5
"""Singular values below it, relative to the largest, are dropped."""


def _workspace(context: TensorContext) -> int:
    """Return the bytes: the Gram matrix, its eigenvectors and the solver's work, or the sums of both signs and temporaries."""
    assert context.matrix is not None
    rows, columns = context.matrix
    return 8 * (6 * rows * columns + 5 * rows * rows) + packed_bytes(rows, columns)


@method(
    "knots",
    cost=88,
    access="tensor",
    base="required",
    matrices=True,
    workspace=_workspace,
    bounds={"density": (0.0, 1.0)},
    paper="Stoica et al. 2024, https://arxiv.org/abs/2410.19735",
)
def knots(
    context: TensorContext,
    *,
    weight: PerModel[float] = per_model(1.0),
    density: PerModel[float] = per_model(1.0),
    lambda_: float = 1.0,
) -> Rule:
    """TIES of aligned task vectors: theta = theta_0 + lambda * U ties(U' delta_1, U' delta_2, ...), in fp64.

    U has the left singular vectors of all delta_i side by side whose singular value exceeds 1e-5 of the largest. TIES keeps the
    top `density` of each model's magnitudes (all of those equal to the threshold), elects a sign per entry, and takes the mean
    of the agreeing ones. Entries below the rounding error of the decomposition are 0 and have no vote. Tensors that are not
    matrices get the mean of the task vectors.
    """
    return merge_matrices(context, weight, partial(aligned_ties, densities=tuple(density)), lambda_)


def aligned_ties(deltas: Deltas, *, densities: tuple[float, ...]) -> torch.Tensor:
    """Return U times the TIES merge of U' delta_i."""
    import torch

    rows, columns = deltas.shape
    gram = torch.zeros((rows, rows), dtype=torch.float64, device=deltas.device)
    for delta in each(deltas):
        gram += delta @ delta.T
    squares, vectors = torch.linalg.eigh(gram)
    del gram
    top = float(squares[-1].clamp(min=0.0)) ** 0.5
    basis = vectors[:, squares > (_LEAST * top) ** 2] if top else vectors[:, :0]
    del vectors
    noise = cutoff(top, (rows, columns * len(deltas)))
    up = basis.new_zeros((basis.shape[1], columns))
    down, ups, downs = (
        up.clone(),
        torch.zeros_like(up, dtype=torch.int16),
        torch.zeros_like(up, dtype=torch.int16),
    )
    for delta, density in zip(each(deltas), densities, strict=True):
        entries = basis.T @ delta
        trim(entries, density, noise)
        up += entries.clamp(min=0.0)
        down += entries.clamp(max=0.0)
        ups += entries > 0
        downs += entries < 0
    sign = (up + down).sign_()
    up.div_(ups.clamp(min=1)).masked_fill_(sign <= 0, 0.0)
    down.div_(downs.clamp(min=1)).masked_fill_(sign >= 0, 0.0)
    return basis @ up.add_(down)


def trim(entries: torch.Tensor, density: float, noise: float) -> None:
    """Set all entries to 0 but the int(density * n) largest magnitudes, at least 1, and those equal to the last of them."""
    sizes = entries.abs()
    k = max(1, int(density * sizes.numel()))
    least = noise
    if 0 < density < 1 and sizes.numel():
        least = max(noise, float(sizes.flatten().kthvalue(sizes.numel() - k + 1).values))
    dropped = sizes < least if least > noise else sizes <= noise
    entries.masked_fill_(dropped if density > 0 else sizes >= 0, 0.0)
