"""Counts and sums of magnitudes against their definitions in numpy, over values and lengths that betray a fast path."""

import numpy as np
import pytest

from streammerge.kernels.magnitudes import abs_sums, keys_in_window
from streammerge.kernels.operands import CODES, Masks, Operand, Operands, Span, Window

LENGTHS = [1, 7, 63, 64, 65, 512, 577, 4096, 9001]
PLAIN = Masks(
    np.zeros((1, 2), np.int64),
    np.zeros((1, 4), np.uint32),
    np.array([[-1, 0, 0, -1, 0, 0]], np.int64),
    np.zeros((1, 4), np.uint32),
)


def operands(dtype: str, n: int) -> tuple[Operands, Operand, np.ndarray]:
    """Return a model and a base with zeros, ties, denormals and non-finite entries, and the model minus the base."""
    rng = np.random.default_rng(n)
    values = rng.standard_normal(2 * n, np.float32) * np.float32(1e-2)
    values[rng.random(2 * n) < 0.3] = 0.25
    values[rng.random(2 * n) < 0.05] = -0.0
    values[rng.random(2 * n) < 0.02] = 1e-40
    values[n::97] = np.inf
    values[n + 5 :: 211] = np.nan
    if dtype == "BF16":
        half = (values.view(np.uint32) >> 16).astype(np.uint16)
        values = (half.astype(np.uint32) << 16).view(np.float32)
        half = np.concatenate([half, np.zeros(2 * n % 2 + 2, np.uint16)])
        full = half[: half.size & ~1].view(np.uint32)
    else:
        full = values.view(np.uint32)
        half = full.view(np.uint16)
    width, code = (2 if dtype == "BF16" else 4), CODES[dtype]
    base = Operand(half, full, 0, code)
    with np.errstate(invalid="ignore"):
        delta = values[n:] - values[:n]
    return Operands(half, full, np.array([width * n]), np.array([code])), base, delta


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("n", LENGTHS)
def test_keys_in_a_window_are_those_of_sorted_patterns(dtype: str, n: int) -> None:
    model, base, delta = operands(dtype, n)
    keys = (delta.view(np.uint32) & 0x7FFFFFFF).astype(np.int64)
    common = int(np.median(keys))
    for low, high, shift in [
        (0, (1 << 31) - 1, 15),
        (common, common, 0),
        (common, common + 9000, 3),
        (0, 0, 0),
    ]:
        bins = np.ones(((high - low) >> shift) + 1, np.int32)
        above, highest = keys_in_window(model, base, Span(0, n), PLAIN, Window(low, high, shift), bins)
        inside = keys[(keys >= low) & (keys <= high)]
        assert (bins - 1 == np.bincount((inside - low) >> shift, minlength=bins.size)).all()
        assert (above, highest) == (np.count_nonzero(keys > high), keys.max())


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("n", LENGTHS)
def test_sums_of_magnitudes_add_in_eight_lanes(dtype: str, n: int) -> None:
    model, base, delta = operands(dtype, n)
    partials = np.full(-(-n // 4096), np.nan)
    abs_sums(model, base, Span(0, n), PLAIN, partials)
    sizes = np.where(np.isfinite(delta), np.abs(delta), 0).astype(np.float64)
    lanes = np.cumsum(np.append(sizes, np.zeros(-n % 4096)).reshape(-1, 512, 8), axis=1)[:, -1]
    pairs = lanes[:, ::2] + lanes[:, 1::2]
    assert (partials == (pairs[:, 0] + pairs[:, 1]) + (pairs[:, 2] + pairs[:, 3])).all()
