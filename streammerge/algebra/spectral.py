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
_STRIPES, _NARROWEST = 8, 128
"""A Gram matrix is computed in so many stripes of columns, of at least so many: nearly half of it is not needed."""
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


def cutoff(largest: float, shape: Sequence[int]) -> float:
    """Return the singular value up to which a matrix counts as rank-deficient."""
    return max(shape) * _ROUNDING * largest


def svd(owned: list[torch.Tensor], most: int | None = None) -> Svd:
    """Return the decomposition of a matrix, fp64.

    Parameters
    ----------
    owned
        The matrix alone; it is removed from the list, and freed as soon as it is no longer needed.
    most
        Number of singular values that are wanted, the largest; None: all.
    """
    import torch

    matrix = owned.pop()
    shape = matrix.shape
    turned = shape[0] < shape[1]
    rest = matrix.T if turned else matrix
    del matrix
    found: list[Svd] = []
    basis: torch.Tensor | None = None
    least, wanted = 0.0, min(shape) if most is None else most
    while wanted > 0 and rest.shape[1]:
        lengths, vectors = eigen(rest)
        least = least if found else cutoff(float(lengths[0]), shape)
        n = count_exact(lengths, least)
        if not n:
            break
        kept = min(n, wanted)
        right = vectors[:, :kept]
        left = rest @ right
        values = torch.linalg.vector_norm(left, dim=0)
        left /= values
        found.append(Svd(left, values, right if basis is None else basis @ right))
        wanted -= kept
        if not wanted or n == len(lengths):
            break
        rest = rest @ vectors[:, n:]
        rest.addmm_(left, left.T @ rest, alpha=-1.0)
        basis = vectors[:, n:] if basis is None else basis @ vectors[:, n:]
        del left, right, vectors
        if float(torch.linalg.vector_norm(rest)) <= least:
            break
    return _joined(found, turned) if found else _nothing(rest, shape, turned)


def eigen(rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the roots of the eigenvalues of a matrix's Gram matrix, descending, and its eigenvectors.

    Parameters
    ----------
    rest
        (rows, columns), with at least as many rows as columns.
    """
    import torch

    values, vectors = torch.linalg.eigh(_gram(rest), UPLO="L")
    return values.flip(0).clamp_(min=0.0).sqrt_(), vectors.flip(1)


def _gram(rest: torch.Tensor) -> torch.Tensor:
    """Return the Gram matrix, (columns, columns), above whose blocks of the diagonal nothing is computed."""
    n = rest.shape[1]
    step = max(_NARROWEST, -(-n // _STRIPES))
    gram = rest.new_zeros((n, n))
    for a in range(0, n, step):
        gram[a:, a : a + step] = rest[:, a:].T @ rest[:, a : a + step]
    return gram


def count_exact(lengths: torch.Tensor, least: float) -> int:
    """Return how many of the singular values that a Gram matrix gives, descending, are accurate and above `least`."""
    top = float(lengths[0])
    return int((lengths > max(_LEVEL * top, least)).sum()) if top > least else 0


def _nothing(rest: torch.Tensor, shape: Sequence[int], turned: bool) -> Svd:
    """Return the decomposition of a matrix of rank 0, where `rest` is."""
    none = rest.new_zeros((max(shape), 0))
    tall, low = none, none[: min(shape)]
    return Svd(low, rest.new_zeros(0), tall) if turned else Svd(tall, rest.new_zeros(0), low)


def _joined(found: Sequence[Svd], turned: bool) -> Svd:
    import torch

    left, values, right = found[0]
    if len(found) > 1:
        left, right = (torch.cat([getattr(one, side) for one in found], dim=1) for side in ("left", "right"))
        values = torch.cat([one.values for one in found])
    order = values.argsort(descending=True, stable=True)
    if bool((order[1:] < order[:-1]).any()):
        left, values, right = left[:, order], values[order], right[:, order]
    return Svd(right, values, left) if turned else Svd(left, values, right)


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

    First what the eigensolver takes, then the vectors that are taken and what is left, before and after.
    """
    matrix, square = rows * columns, min(rows, columns) ** 2
    return max(eigen_bytes(rows, columns), 8 * (3 * matrix + 2 * square) + packed_bytes(rows, columns))


def eigen_bytes(rows: int, columns: int) -> int:
    """Return an upper bound of the bytes held while the eigenvectors of a matrix's Gram matrix are computed.

    The matrix, its Gram matrix, the eigenvectors, twice as much for the solver, and the vectors that were found before.
    """
    square = min(rows, columns) ** 2
    return 8 * (rows * columns + 5 * square) + packed_bytes(rows, columns)


def packed_bytes(rows: int, columns: int) -> int:
    """Return an upper bound of the bytes in which BLAS packs operands, and of smaller vectors."""
    return min(_PACKED, 64 * rows * columns)


_PACKED = 32 << 20
"""Bytes that BLAS packs in at most; MKL took 26 MiB for the largest matrices."""
