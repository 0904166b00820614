"""The matrices of RegMean's regression, computed from Gram matrices with torch in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

_SINGLE = float(np.finfo(np.float32).eps)


def regression_operators(
    grams: list[NDArray[np.float32]], alpha: float, weights: Sequence[float]
) -> tuple[torch.Tensor, ...]:
    """Return P_i = G_i (sum G)^+ of each model: by Cholesky, or by eigenvalues where directions have no data.

    A direction has data if its eigenvalue, relative to the largest, exceeds the rounding error of an fp32 matrix of
    this size.

    Parameters
    ----------
    grams
        One per model, (inputs, inputs); removed from the list one by one, so that none is held twice.
    alpha
        Factor of the off-diagonal entries.
    weights
        Factor of each model's matrix.
    """
    import torch

    n = len(grams[0])
    scaled: list[torch.Tensor] = []
    while grams:
        gram = torch.from_numpy(grams.pop(0)).double()
        diagonal = gram.diagonal().clone()
        gram.mul_(alpha * weights[len(scaled)])
        gram.diagonal().copy_(diagonal * weights[len(scaled)])
        scaled.append(gram)
    total = torch.zeros(n, n, dtype=torch.float64)
    for gram in scaled:
        total += gram
    root, info = torch.linalg.cholesky_ex(total)
    pivots = root.diagonal()
    if int(info) == 0 and float((pivots.min() / pivots.max()) ** 2) > n * _SINGLE:
        for i, gram in enumerate(scaled):
            scaled[i] = torch.cholesky_solve(gram, root).T.contiguous()
        return tuple(scaled)
    values, vectors = torch.linalg.eigh(total)
    kept = values > n * _SINGLE * values[-1].clamp(min=0.0)
    inverse = vectors[:, kept] / values[kept] @ vectors[:, kept].T
    for i, gram in enumerate(scaled):
        scaled[i] = gram @ inverse
    return tuple(scaled)
