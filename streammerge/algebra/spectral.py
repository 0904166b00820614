"""Singular values and vectors of a matrix in memory, in fp64 with torch, restricted to its numerical rank.

A Gram matrix is decomposed several times faster than the matrix itself, but knows only half the digits of singular values
that are small next to the largest. So those within a factor of `_LEVEL` of the largest are taken first. What is left of
the matrix, orthogonal to their vectors, has a Gram matrix of its own, until nothing is left above rounding errors::

    G = R'R = W L W'      R: the matrix, then what is left of it
    C = R W               its columns, of length s, are the left vectors times the singular values
    R <- (I - U U') C     of the columns that are too short to be exact; U: the others, divided by their lengths

All functions expect one thread of BLAS; their bits then depend on the matrix alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

_LEVEL = 2.0**-8
"""Singular values that one Gram matrix gives, relative to the largest; their vectors are orthogonal to 1e-11."""
_ROUNDING = 2.0**-52
_SAFE = 1e-9
"""Squared ratio of the smallest to the largest pivot above which a Gram matrix has full rank beyond doubt."""


class Svd(NamedTuple):
    """The singular values of a matrix that are not zero, with their vectors: ``left * values @ right.T``."""

    left: torch.Tensor
    """(rows, rank)"""
    values: torch.Tensor
    """(rank,), descending."""
    right: torch.Tensor
    """(columns, rank)"""

    def first(self, k: int) -> Svd:
        """Return the largest `k` of them, without keeping the memory of the others."""
        if k >= len(self.values):
            return self
        return Svd(self.left[:, :k].clone(), self.values[:k].clone(), self.right[:, :k].clone())


def cutoff(largest: float, shape: Sequence[int]) -> float:
    """Return the singular value up to which a matrix counts as rank-deficient."""
    return max(shape) * _ROUNDING * largest


def svd(owned: list[torch.Tensor]) -> Svd:
    """Return the decomposition of a matrix, fp64.

    Parameters
    ----------
    owned
        The matrix alone; it is removed from the list, and freed as soon as it is no longer needed.
    """
    import torch

    matrix = owned.pop()
    shape = matrix.shape
    turned = shape[0] < shape[1]
    rest = matrix.T if turned else matrix
    del matrix
    found: list[Svd] = []
    basis: torch.Tensor | None = None
    least = 0.0
    while rest.shape[1]:
        columns, vectors = _along_eigenvectors(rest)
        del rest
        lengths = torch.linalg.vector_norm(columns, dim=0)
        top = float(lengths.max())
        least = least if found else cutoff(top, shape)
        if not top > least:
            break
        taken = lengths > max(_LEVEL * top, least)
        whole = bool(taken.all())
        left = (columns if whole else columns[:, taken]).div_(lengths[taken])
        right = vectors if whole else vectors[:, taken]
        found.append(Svd(left, lengths[taken], right if basis is None else basis @ right))
        if whole:
            break
        rest = columns[:, ~taken]
        del columns
        rest -= left @ (left.T @ rest)
        basis = vectors[:, ~taken] if basis is None else basis @ vectors[:, ~taken]
        if float(torch.linalg.vector_norm(rest)) <= least:
            break
    return _joined(found, shape, turned)


def _along_eigenvectors(rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix times the eigenvectors of its Gram matrix, and these, for descending eigenvalues."""
    import torch

    _, vectors = torch.linalg.eigh(rest.T @ rest)
    vectors = vectors.flip(1)
    return rest @ vectors, vectors


def _joined(found: Sequence[Svd], shape: Sequence[int], turned: bool) -> Svd:
    import torch

    if not found:
        none = torch.zeros((max(shape), 0), dtype=torch.float64)
        found = [Svd(none, torch.zeros(0, dtype=torch.float64), none[: min(shape)])]
    left, values, right = found[0]
    if len(found) > 1:
        left, right = (torch.cat([getattr(one, side) for one in found], dim=1) for side in ("left", "right"))
        values = torch.cat([one.values for one in found])
    order = values.argsort(descending=True, stable=True)
    if bool((order[1:] < order[:-1]).any()):
        left, values, right = left[:, order], values[order], right[:, order]
    return Svd(right, values, left) if turned else Svd(left, values, right)


def polar(owned: list[torch.Tensor]) -> torch.Tensor:
    """Return the polar factor U V' of a matrix, (rows, columns): on its numerical rank the nearest orthogonal matrix.

    Parameters
    ----------
    owned
        As for `svd`.
    """
    left, _, right = svd(owned)
    return left @ right.T


def solved(product: list[torch.Tensor], gram: list[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """Return ``product @ pinv(gram)`` for a symmetric matrix without negative eigenvalues, on its numerical rank.

    Parameters
    ----------
    product, gram
        (rows, n) and (n, n), each alone in a list, from which it is removed.
    shape
        Rows and columns of the matrices that the Gram matrix was summed from, which determine its rounding error.
    """
    import torch

    symmetric = gram.pop()
    root, info = torch.linalg.cholesky_ex(symmetric)
    pivots = root.diagonal()
    if int(info) == 0 and float((pivots.min() / pivots.max()) ** 2) > _SAFE:
        del symmetric
        return torch.cholesky_solve(product.pop().T, root).T
    del root, pivots
    values, vectors = torch.linalg.eigh(symmetric)
    del symmetric
    kept = values > cutoff(float(values[-1].clamp(min=0.0)), shape)
    values, vectors = values[kept], vectors[:, kept]
    return ((product.pop() @ vectors) / values) @ vectors.T


def svd_bytes(rows: int, columns: int) -> int:
    """Return an upper bound of the bytes that `svd` takes, with the matrix and the result.

    First the matrix, its Gram matrix, the eigenvectors and twice as much for the solver; then the columns along the
    eigenvectors, those taken, those left, and eigenvectors twice.
    """
    matrix, square = rows * columns, min(rows, columns) ** 2
    return 8 * max(matrix + 4 * square, 3 * matrix + 2 * square) + packed_bytes(rows, columns)


def packed_bytes(rows: int, columns: int) -> int:
    """Return an upper bound of the bytes in which BLAS packs operands, and of smaller vectors."""
    return min(_PACKED, 64 * rows * columns)


_PACKED = 32 << 20
"""Bytes that BLAS packs in at most; MKL took 26 MiB for the largest matrices."""
