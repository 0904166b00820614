"""The polar factor of a matrix in memory, U V' of its decomposition U S V', restricted to its numerical rank, in fp64.

Where all singular values are accurate, U V' = A G^(-1/2) for the Gram matrix G = A'A, so that U is never formed. What is
left along the vectors of smaller ones has a polar factor of its own; see `streammerge.algebra.spectral`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from streammerge.algebra.spectral import count_exact, cutoff, eigen, eigen_bytes, packed_bytes

if TYPE_CHECKING:
    import torch


class Polar(NamedTuple):
    """The rest of a decomposition whose singular values are set to 1."""

    factor: torch.Tensor
    """U V', (rows, columns): on the numerical rank the nearest orthogonal matrix."""
    total: float
    """The sum of the singular values."""


def polar(owned: list[torch.Tensor]) -> Polar:
    """Return the polar factor of a matrix and the sum of its singular values.

    Parameters
    ----------
    owned
        The matrix alone; it is removed from the list, and freed as soon as it is no longer needed.
    """
    matrix = owned.pop()
    shape = matrix.shape
    turned = shape[0] < shape[1]
    whole = [matrix.T if turned else matrix]
    del matrix
    factor, total = _of_tall(whole, shape, None)
    return Polar(factor.T if turned else factor, total)


def _of_tall(owned: list[torch.Tensor], shape: tuple[int, ...], least: float | None) -> Polar:
    """Return the same for a matrix with at least as many rows as columns, which may be what is left of one.

    Parameters
    ----------
    shape
        Rows and columns of the whole matrix.
    least
        Singular value up to which the whole matrix counts as rank-deficient; None: this is the whole matrix.
    """
    import torch

    rest = owned.pop()
    if not rest.shape[1]:
        return Polar(rest, 0.0)
    lengths, vectors = eigen(rest)
    least = cutoff(float(lengths[0]), shape) if least is None else least
    n = count_exact(lengths, least)
    if not n:
        return Polar(torch.zeros_like(rest), 0.0)
    lengths, right, others = lengths[:n], vectors[:, :n], vectors[:, n:]
    del vectors
    left, factor = None, None
    if n <= others.shape[1]:
        left = (rest @ right).div_(lengths)
    else:
        factor = rest @ ((right / lengths) @ right.T)
    thin = [_without(rest, rest @ others, left, right, lengths)] if others.shape[1] else []
    del rest
    total = float(lengths.sum())
    if thin and float(torch.linalg.vector_norm(thin[0])) > least:
        inner = _of_tall(thin, shape, least)
        total += inner.total
        narrow = inner.factor
        del inner
        factor = narrow @ others.T if factor is None else factor.addmm_(narrow, others.T)
        del narrow
    if left is not None:
        factor = left @ right.T if factor is None else factor.addmm_(left, right.T)
    assert factor is not None
    return Polar(factor, total)


def _without(
    rest: torch.Tensor,
    columns: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    """Subtract the parts of some columns that lie in the span of the left vectors U = `rest` @ `right` / `lengths`.

    Rounding errors of the Gram matrix put them there. If U is not given, since it is large, it is not formed.
    """
    if left is not None:
        columns.addmm_(left, left.T @ columns, alpha=-1.0)
    else:
        along = (right.T @ (rest.T @ columns)).div_((lengths**2)[:, None])
        columns.addmm_(rest, right @ along, alpha=-1.0)
    return columns


def polar_bytes(rows: int, columns: int) -> int:
    """Return an upper bound of the bytes that `polar` takes, with the matrix and the result.

    After the eigensolver: the matrix, the factor, up to half as many columns of what is left, and squares.
    """
    matrix, square = rows * columns, min(rows, columns) ** 2
    later = 4 * (5 * matrix + 5 * square) + packed_bytes(rows, columns)
    return max(eigen_bytes(rows, columns), later)
