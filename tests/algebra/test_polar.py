"""The polar factor and the largest singular vectors of a matrix: accuracy for small singular values, and the numerical rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streammerge.algebra.polar import polar
from streammerge.algebra.spectral import svd

SPECTRA = {
    "flat": np.linspace(1, 0.5, 60),
    "falling": np.logspace(0, -9, 60),
    "few small": np.r_[np.ones(50), 1e-6 * np.linspace(1, 0.5, 10)],
    "few large": np.r_[np.ones(5), 1e-6 * np.linspace(1, 0.5, 55)],
    "three levels": np.repeat([1.0, 1e-3, 1e-8], 20),
    "deficient": np.r_[np.ones(50), np.zeros(10)],
    "nothing": np.zeros(60),
}


def made(shape: tuple[int, int], values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a matrix with these singular values, and its left and right vectors, in columns."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((side, values.size)))[0] for side in shape)
    return (left * values) @ right.T, left, right


@pytest.mark.parametrize("shape", [(60, 60), (90, 60), (60, 90)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_polar_factor_has_every_singular_value_above_the_numerical_rank(
    spectrum: str, shape: tuple[int, int]
) -> None:
    values = SPECTRA[spectrum]
    matrix, left, right = made(shape, values)
    rank = int((values > 0).sum())
    found = polar([torch.from_numpy(matrix)])
    wanted = left[:, :rank] @ right[:, :rank].T
    # The vectors of a singular value s are known to 2**-53 / s, since the matrix itself is rounded.
    least = values[rank - 1] if rank else 1.0
    assert np.abs(found.factor.numpy() - wanted).max() <= 1e-10 + 1e-15 / least
    assert found.total == pytest.approx(values.sum(), rel=1e-10)


@pytest.mark.parametrize("spectrum", ["falling", "few large", "three levels"])
@pytest.mark.parametrize("most", [3, 20, 40])
def test_the_largest_singular_values_are_those_of_the_whole_decomposition(spectrum: str, most: int) -> None:
    values = SPECTRA[spectrum]
    matrix, _, _ = made((60, 90), values)
    first = svd([torch.from_numpy(matrix)], most)
    assert len(first.values) == most
    np.testing.assert_allclose(first.values.numpy(), values[:most], rtol=1e-8)
    rest = matrix - ((first.left * first.values) @ first.right.T).numpy()
    assert np.linalg.norm(rest, 2) <= values[most] * (1 + 1e-6) + 1e-14
