"""The approximation of low rank: Eckart and Young's residual, digits of small values, and bits without regard to memory."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from streammerge.algebra import low_rank
from streammerge.algebra.low_rank import (
    Decomposition,
    Matrix,
    computed_rank,
    decompose,
    decompose_product,
    hold,
)

ASKED = 12
SPECTRA = {
    "flat": np.linspace(1, 0.5, 60),
    "falling": np.logspace(0, -12, 60),
    "clusters": np.repeat([1.0, 1e-3, 1e-9], 20),
    "one large": np.r_[np.ones(5), 1e-7 * np.linspace(1, 0.5, 55)],
    "deficient": np.r_[np.ones(5), np.zeros(55)],
    "nothing": np.zeros(60),
}


class Rows:
    """A matrix in memory that counts the rows that are read."""

    def __init__(self, whole: Matrix) -> None:
        self.whole, self.n_read = whole, 0
        self.shape = whole.shape[0], whole.shape[1]

    def read(self, first: int, last: int, out: Matrix) -> None:
        self.n_read += last - first
        out[:] = self.whole[first:last]


def matrix(values: Matrix, rows: int, *, turned: bool = False) -> Matrix:
    rng = np.random.default_rng(1)
    left, _ = np.linalg.qr(rng.standard_normal((rows, values.size)))
    right, _ = np.linalg.qr(rng.standard_normal((values.size, values.size)))
    whole = (left * values) @ right
    return np.ascontiguousarray(whole.T if turned else whole)


def decomposed(rows: Rows, held: int = 0) -> Decomposition:
    with threadpool_limits(1, "blas"):
        taken = hold(rows, take) if held >= rows.shape[0] else rows
        return decompose(taken, computed_rank(rows.shape, ASKED), held, take)


def take(n: int, k: int) -> Matrix:
    return np.full((n, k), np.nan)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_BLOCK", 64)  # blocks of 16 rows


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", SPECTRA)
def test_it_is_the_best_of_its_rank_and_its_bits_do_not_depend_on_the_memory(name: str, turned: bool) -> None:
    whole = matrix(SPECTRA[name], 150, turned=turned)
    values = np.linalg.svd(whole, compute_uv=False)
    found = decomposed(Rows(whole))
    n = min(ASKED, found.values.size)
    rest = whole - (found.left[:, :n] * found.values[:n]) @ found.right[:n]
    scale = max(values[0], 1e-300)
    assert np.linalg.norm(rest) <= np.linalg.norm(values[n:]) * (1 + 1e-6) + 1e-14 * scale
    assert np.allclose(found.values[:n], values[:n], rtol=1e-9, atol=1e-14 * scale)
    assert found.square_sum == pytest.approx(float(np.sum(whole**2)), rel=1e-13)
    for held in (40, whole.shape[0]):
        again = decomposed(Rows(whole), held)
        for part in ("left", "values", "right"):
            assert np.array_equal(getattr(again, part), getattr(found, part)), held


def test_what_lies_below_the_numerical_rank_is_exactly_zero() -> None:
    found = decomposed(Rows(matrix(SPECTRA["deficient"], 150)))
    assert np.count_nonzero(found.values) == 5
    assert not decomposed(Rows(np.zeros((150, 60)))).values.size


def test_held_rows_save_reads() -> None:
    whole = matrix(SPECTRA["flat"], 150, turned=True)
    counts = []
    for held in (16, 32, whole.shape[0]):
        rows = Rows(whole)
        decomposed(rows, held)
        counts.append(rows.n_read / whole.shape[0])
    assert counts[0] > counts[1] > counts[2] == 1


def test_a_matrix_of_which_most_is_asked_is_decomposed_as_a_whole() -> None:
    whole = matrix(SPECTRA["flat"], 80)
    rows = Rows(whole)
    with threadpool_limits(1, "blas"):
        found = decompose(rows, 60, 0, lambda n, k: np.empty((n, k)))
    assert rows.n_read == 80
    assert np.allclose((found.left * found.values) @ found.right, whole, atol=1e-14)


def test_a_product_is_decomposed_without_being_formed() -> None:
    rng = np.random.default_rng(2)
    left, right = rng.standard_normal((50, 9)), rng.standard_normal((9, 40))
    left[:, 8] = left[:, 0]  # dependent, as when one adapter is given twice
    found = decompose_product(left, right, 20)
    assert np.count_nonzero(found.values) == 8
    assert np.allclose((found.left * found.values) @ found.right, left @ right, atol=1e-13)
    assert found.square_sum == pytest.approx(float(np.sum((left @ right) ** 2)), rel=1e-13)
    assert not decompose_product(left, 0 * right, 20).values.size
