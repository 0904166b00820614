"""The best approximation of a matrix by one of low rank (Eckart and Young, 1936), in fp64, from blocks of its rows.

The matrix need not fit in memory. Its Gram matrix on the smaller side has the singular vectors as eigenvectors, but loses
half the digits of small singular values. One step of subspace iteration on the matrix itself restores them::

    G = D'D (or DD')     eigenvectors V of the k largest eigenvalues      pass 1
    Q = orth(D V)                                                         pass 2
    W = D'Q = U S P'     D is approximated by (Q P) S U'                  pass 3

Singular values below 1e-6 of the largest are lost in a Gram matrix; what is left after the larger ones are subtracted
has a Gram matrix of its own. Blocks have a size that depends on the shape alone, and each product is one call of BLAS,
so with BLAS in one thread the bits do not depend on the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from streammerge.records import dataclass

Matrix = NDArray[np.float64]
Take = Callable[[int, int], Matrix]
"""Function that returns an uninitialised matrix of so many rows and columns, in C order."""

_BLOCK = 1 << 20
"""Most elements of a block of rows, unless that is fewer than 16 rows."""
_LOST = 1e-6
"""Singular values below this fraction of the largest are not accurate if they come from one Gram matrix."""
_MORE = 8
"""Singular vectors that are computed in addition to those asked for, which makes the iteration converge faster."""
_WORK = 64
"""Numbers per row that LAPACK's eigensolver takes as workspace."""


class Rows(Protocol):
    """A matrix whose rows are read as they are needed."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""

    def read(self, first: int, last: int, out: Matrix) -> None:
        """Write rows `first` to `last` to `out`, (last - first, columns)."""


@dataclass(frozen=True)
class Decomposition:
    """The largest singular values of a matrix, and their vectors: ``left * values @ right``."""

    left: Matrix
    """(rows, k)"""
    values: NDArray[np.float64]
    """(k,), descending; below the numerical rank exactly zero."""
    right: Matrix
    """(k, columns)"""
    square_sum: float
    """The sum of the squares of all elements of the matrix."""


def block_rows(columns: int) -> int:
    """Return the number of rows that are read at a time.

    >>> block_rows(4096), block_rows(11008), block_rows(1 << 20)
    (256, 64, 16)
    """
    rows = 256
    while rows > 16 and rows * columns > _BLOCK:
        rows //= 2
    return rows


def computed_rank(shape: tuple[int, int], rank: int) -> int:
    """Return the number of singular vectors that are computed if `rank` are asked for."""
    return min(*shape, rank + _MORE)


def is_dense(shape: tuple[int, int], computed: int) -> bool:
    """Return whether a matrix is decomposed as a whole: most of its vectors are asked for, or it is small."""
    return 2 * computed >= min(shape)


def held_bytes(shape: tuple[int, int], computed: int, held: int) -> int:
    """Return an upper bound of the bytes that `decompose` needs if `held` rows are held between products."""
    rows, columns = shape
    small, large = sorted(shape)
    block = block_rows(columns) * columns
    if is_dense(shape, computed):
        return 8 * (5 * rows * columns + 2 * small * small + _WORK * large + block)
    gram = small * (small + _WORK)
    vectors = 5 * computed * (rows + columns) + 6 * computed * computed
    return 8 * (min(held, rows) * columns + 2 * block + gram + vectors) + (1 << 20)


def decompose(rows: Rows, computed: int, held: int, take: Take) -> Decomposition:
    """Return the `computed` largest singular values of a matrix and their vectors.

    Parameters
    ----------
    rows
        The matrix; one that is `Held` is not read again.
    held
        Number of rows that may be held between products. A matrix with fewer rows than columns is read several times
        for its Gram matrix if they are not all.
    take
        Allocates working memory for large matrices.
    """
    shape = rows.shape
    if is_dense(shape, computed):
        rows = hold(rows, take)
    if isinstance(rows, Held) and is_dense(shape, computed):
        return _dense(rows.whole, computed)
    size, small = block_rows(shape[1]), min(shape)
    kept = rows.whole if isinstance(rows, Held) else take(0, shape[1])
    if small < shape[1] and not isinstance(rows, Held):
        kept = take(min(shape[0], max(1, held // size) * size), shape[1])
    space = _Space(take(min(shape[0], size), shape[1]), take(small, small).T, kept)
    return _streamed(rows, computed, space, None)


@dataclass(frozen=True)
class _Space:
    """Working memory."""

    block: Matrix
    """One block of rows."""
    gram: Matrix
    """The Gram matrix, in Fortran's order."""
    kept: Matrix
    """Rows that are held between products; all rows if the matrix is `Held`."""


def decompose_product(left: Matrix, right: Matrix, computed: int) -> Decomposition:
    """Return the same for ``left @ right``, (rows, r) and (r, columns), without forming the product."""
    from scipy.linalg import qr, svd

    outer, one = qr(left, mode="economic", check_finite=False)
    inner, other = qr(right.T, mode="economic", check_finite=False)
    core = one @ other.T
    total = _square_sum(core)
    if not total or not np.isfinite(total):
        return _nothing((left.shape[0], right.shape[1]), total)
    start, values, end = svd(core, full_matrices=False, check_finite=False)
    n = min(computed, values.size)
    top = float(values[0])
    return _settled(outer @ start[:, :n], values[:n], end[:n] @ inner.T, total, top)


def hold(rows: Rows, take: Take, step: int | None = None) -> Held:
    """Return a matrix held in memory; `step` rows are read at a time (default: a block)."""
    if isinstance(rows, Held):
        return rows
    whole = take(*rows.shape)
    step = step or block_rows(rows.shape[1])
    for first in range(0, rows.shape[0], step):
        last = min(rows.shape[0], first + step)
        rows.read(first, last, whole[first:last])
    return Held(whole)


class Held:
    """A matrix in memory."""

    def __init__(self, whole: Matrix) -> None:
        self.whole = whole

    @property
    def shape(self) -> tuple[int, int]:
        """See `Rows`."""
        return self.whole.shape[0], self.whole.shape[1]

    def read(self, first: int, last: int, out: Matrix) -> None:
        """See `Rows`."""
        out[:] = self.whole[first:last]


class _Rest:
    """What is left of a matrix after an approximation is subtracted."""

    def __init__(self, rows: Rows, found: Decomposition) -> None:
        self._rows, self._found = rows, found
        self.shape = rows.shape

    def read(self, first: int, last: int, out: Matrix) -> None:
        self._rows.read(first, last, out)
        out -= (self._found.left[first:last] * self._found.values) @ self._found.right


def _dense(whole: Matrix, computed: int) -> Decomposition:
    from scipy.linalg import svd

    total = _square_sum(whole)
    if not total or not np.isfinite(total):
        return _nothing(whole.shape, total)
    left, values, right = svd(whole, full_matrices=False, check_finite=False)
    return _settled(left[:, :computed], values[:computed], right[:computed], total, float(values[0]))


def _streamed(rows: Rows, computed: int, space: _Space, largest: float | None) -> Decomposition:
    """Return the decomposition; `largest` is the largest singular value of the matrix that `rows` is left of."""
    shape, gram = rows.shape, space.gram
    tall = shape[0] >= shape[1]
    if tall:
        _gram_of_columns(rows, space.block, gram)
    else:
        _gram_of_rows(rows, space)
    total = float(np.trace(gram))
    if not total or not np.isfinite(total):
        return _nothing(shape, total)
    left, values, right = _iterated(rows, _eigenvectors(gram, computed), space.block, tall=tall)
    top = float(values[0]) if largest is None else largest
    found = _settled(left, values, right, total, top)
    good = int(np.count_nonzero(found.values > _LOST * top))
    if largest is not None or good == computed or not found.values[good]:
        return found
    first = Decomposition(found.left[:, :good], found.values[:good], found.right[:good], total)
    if isinstance(rows, Held):  # whose rows are needed again
        space = replace(space, kept=np.empty_like(space.block))
    rest = _streamed(_Rest(rows, first), computed - good, space, top)
    return Decomposition(
        np.concatenate([first.left, rest.left], axis=1),
        np.concatenate([first.values, rest.values]),
        np.concatenate([first.right, rest.right]),
        total,
    )


def _gram_of_columns(rows: Rows, block: Matrix, gram: Matrix) -> None:
    """Write the lower triangle of D'D, (columns, columns)."""
    from scipy.linalg.blas import dsyrk

    gram[:] = 0
    for first, last in blocks(rows.shape):
        part = block[: last - first]
        rows.read(first, last, part)
        dsyrk(1.0, part.T, beta=1.0, c=gram, lower=1, overwrite_c=1)


def _gram_of_rows(rows: Rows, space: _Space) -> None:
    """Write the lower triangle of DD', (rows, rows), in products of two blocks of rows, some of which are held."""
    shape, kept, gram = rows.shape, space.kept, space.gram
    for start in range(0, shape[0], len(kept)):
        stop = min(shape[0], start + len(kept))
        own = [
            (first, last, kept[first - start : last - start]) for first, last in blocks(shape, start, stop)
        ]
        for first, last, part in own if not isinstance(rows, Held) else ():
            rows.read(first, last, part)
        for above, end in blocks(shape, 0, stop):
            other = kept[above - start : end - start] if above >= start else space.block[: end - above]
            if above < start:
                rows.read(above, end, other)
            for first, last, part in own:
                if first >= above:
                    gram[first:last, above:end] = part @ other.T


def _eigenvectors(gram: Matrix, n: int) -> Matrix:
    """Return the eigenvectors of the `n` largest eigenvalues, (size, n), largest first; the matrix is overwritten."""
    from scipy.linalg import eigh

    size = len(gram)
    wanted = [size - n, size - 1]
    _, vectors = eigh(
        gram, lower=True, overwrite_a=True, check_finite=False, driver="evr", subset_by_index=wanted
    )
    return np.ascontiguousarray(vectors[:, ::-1])


def _iterated(
    rows: Rows, vectors: Matrix, block: Matrix, *, tall: bool
) -> tuple[Matrix, NDArray[np.float64], Matrix]:
    """Return left vectors, singular values and right vectors after one step of subspace iteration."""
    from scipy.linalg import qr, svd

    along = _times if tall else _transposed_times
    back = _transposed_times if tall else _times
    basis, _ = qr(along(rows, vectors, block), mode="economic", overwrite_a=True, check_finite=False)
    basis = np.ascontiguousarray(basis)
    outer, values, inner = svd(
        back(rows, basis, block), full_matrices=False, overwrite_a=True, check_finite=False
    )
    basis = basis @ inner.T
    return (basis, values, outer.T) if tall else (outer, values, basis.T)


def _times(rows: Rows, factor: Matrix, block: Matrix) -> Matrix:
    """Return D F, (rows, k)."""
    product = np.empty((rows.shape[0], factor.shape[1]))
    for first, last in blocks(rows.shape):
        part = block[: last - first]
        rows.read(first, last, part)
        product[first:last] = part @ factor
    return product


def _transposed_times(rows: Rows, factor: Matrix, block: Matrix) -> Matrix:
    """Return D'F, (columns, k)."""
    product = np.zeros((rows.shape[1], factor.shape[1]))
    for first, last in blocks(rows.shape):
        part = block[: last - first]
        rows.read(first, last, part)
        product += part.T @ factor[first:last]
    return product


def _settled(
    left: Matrix, values: NDArray[np.float64], right: Matrix, total: float, largest: float
) -> Decomposition:
    """Return a decomposition with zeros below the numerical rank, and with signs that do not depend on LAPACK."""
    least = max(left.shape[0], right.shape[1]) * 2.0**-52 * largest
    signs = np.sign(left[np.abs(left).argmax(axis=0), np.arange(left.shape[1])])
    return Decomposition(left * signs, np.where(values > least, values, 0.0), right * signs[:, None], total)


def _nothing(shape: tuple[int, int], total: float) -> Decomposition:
    return Decomposition(np.zeros((shape[0], 0)), np.zeros(0), np.zeros((0, shape[1])), total)


def _square_sum(whole: Matrix) -> float:
    return float(sum(np.vdot(whole[first:last], whole[first:last]) for first, last in blocks(whole.shape)))


def blocks(shape: tuple[int, int], start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the blocks of a matrix's rows, from `start` to `stop`, which are ends of blocks."""
    step, stop = block_rows(shape[1]), shape[0] if stop is None else stop
    for first in range(start, stop, step):
        yield first, min(stop, first + step)
