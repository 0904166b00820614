"""The matrices by which regression mixes models (RegMean), from Gram matrices: linear algebra in torch, in fp64."""

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

    A direction has data if its share of the largest is above what fp32 matrices of this size can tell from 0.

    Parameters
    ----------
    grams
        One for each model, (inputs, inputs); taken out of the list one by one, so that they are not held twice.
    alpha
        What lies off their diagonals is multiplied by it.
    weights
        Each matrix is multiplied by its own.
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
