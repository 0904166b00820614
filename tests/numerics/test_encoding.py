"""Codes and scales by the rules that are written down, against a plain numpy of the test's own and against torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streammerge.numerics import encoding
from streammerge.numerics.encoding import (
    block_peaks,
    nvfp4_whole,
    pack,
    scales_of_f8,
    scales_of_integers,
    scales_of_mx,
    scales_of_nvfp4,
    store_scales,
    to_f4,
    to_f8,
    to_integers,
)

F32 = np.float32
EDGES = [0.0, -0.0, 2.0**-149, -(2.0**-140), 1e-38, 448.0, -464.0, 3.4028234663852886e38, 0.001953125, 1.0]


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with the compiled loops, and without."""
    if request.param == "numpy":
        monkeypatch.setattr(encoding, "is_compiled", lambda name: False)


def matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Return values of all magnitudes, zeros and edges among them."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-30, 30, (rows, 1))
    values.flat[:: max(1, values.size // len(EDGES))] = np.resize(
        EDGES, len(values.flat[:: max(1, values.size // len(EDGES))])
    )
    return values.astype(F32)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (128, 128), (130, 300), (3, 1025)])
@pytest.mark.parametrize("block", [(128, 128), (1, 1 << 20), (2, 3)])
def test_a_block_is_known_by_its_largest_magnitude(shape: tuple[int, int], block: tuple[int, int]) -> None:
    rows = matrix(*shape)
    found = block_peaks(rows, block)
    height, width = block
    for i in range(found.shape[0]):
        for j in range(found.shape[1]):
            part = rows[i * height : (i + 1) * height, j * width : (j + 1) * width]
            assert found[i, j] == np.abs(part).max()


@pytest.mark.parametrize("block", [(128, 128), (1, 300), (2, 3)])
def test_codes_are_quotients_rounded_as_torch_rounds_them_and_saturated(block: tuple[int, int]) -> None:
    rows = matrix(130, 300)
    scales = scales_of_f8(block_peaks(rows, block), "BF16")
    out = np.empty(rows.size, np.uint8)
    to_f8(rows, scales, block, out)
    spread = np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[:130, :300]
    quotients = torch.from_numpy((rows / spread).astype(F32)).clamp(-448, 448)
    want = quotients.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(out.reshape(rows.shape), want)


@given(st.floats(0, 2.0**127, width=32))
def test_scales_are_a_448th_rounded_to_their_dtype(peak: float) -> None:
    peaks = np.array([[peak]], F32)
    quotient = peaks / F32(448)
    for dtype, kind, least in (
        ("F32", torch.float32, 2.0**-149),
        ("BF16", torch.bfloat16, 2.0**-133),
        ("F16", torch.float16, 2.0**-24),
    ):
        want = torch.from_numpy(quotient.clip(0, 65504) if dtype == "F16" else quotient).to(kind)
        if peak == 0:
            want = torch.ones_like(want)
        elif float(want) == 0:
            want = torch.tensor([[least]], dtype=kind)
        found = scales_of_f8(peaks, dtype)
        assert torch.equal(torch.from_numpy(found), want.float())
        assert store_scales(found, dtype).tobytes() == want.view(torch.uint8).numpy().tobytes()


@given(st.floats(0, 2.0**127, width=32))
def test_scales_of_exponents_are_the_least_power_of_two_that_suffices(peak: float) -> None:
    found = scales_of_f8(np.array([[peak]], F32), "F8_E8M0")
    byte = int(store_scales(found, "F8_E8M0")[0])
    quotient = float(F32(peak) / F32(448))
    exponents = [e for e in range(-127, 128) if 2.0**e >= quotient]
    assert byte == (127 if peak == 0 else exponents[0] + 127)
    assert float(found[0, 0]) == 2.0 ** (byte - 127)
    assert scales_of_f8(np.array([[peak]], F32), "F32", powers=True) == found


def test_zeros_have_the_scale_one_and_codes_of_zero() -> None:
    rows = np.array([[0.0, -0.0, 0.0]], F32)
    for dtype in ("F32", "BF16", "F16", "F8_E8M0", "U8"):
        scales = scales_of_f8(block_peaks(rows, (1, 3)), dtype)
        assert scales[0, 0] == 1
        out = np.empty(3, np.uint8)
        to_f8(rows, scales, (1, 3), out)
        assert not (out & 0x7F).any()


def test_by_hand() -> None:
    # 448 and its half are the codes 0x7E and 0x76 (exponent 14 of 15, mantissa 6 of 8) of a scale of 1; the least
    # subnormal is 2^-9; half of it ties to zero, and a little more than half does not.
    rows = np.array([[448.0, 224.0, -1.0, 2.0**-9, 2.0**-10, 1.25 * 2.0**-10]], F32)
    scales = scales_of_f8(block_peaks(rows, (1, 6)), "F32")
    out = np.empty(6, np.uint8)
    to_f8(rows, scales, (1, 6), out)
    assert scales.tolist() == [[1.0]]
    assert out.tolist() == [0x7E, 0x76, 0xB8, 0x01, 0x00, 0x01]


def test_codes_of_4_bits_by_hand() -> None:
    # Between two numbers the nearer one, and of two as near the one whose code is even; beyond 6 it is 6.
    values = [0.25, 0.26, 0.75, 0.74, 1.25, 1.26, 1.75, 2.5, 2.6, 3.5, 3.4, 5.0, 5.1, 9.0, -0.6, -7.0]
    codes = [0, 1, 2, 1, 2, 3, 4, 4, 5, 6, 5, 6, 7, 7, 8 + 1, 8 + 7]
    rows = np.array([values], F32)
    out = np.empty(8, np.uint8)
    to_f4(rows, F32(1), np.ones((1, 1), F32), (1, 16), out)
    assert [code for byte in out.tolist() for code in (byte & 15, byte >> 4)] == codes
    to_f4(rows, F32(2), np.full((1, 1), 2, F32), (1, 16), out)
    assert [code for byte in out.tolist() for code in (byte & 15, byte >> 4)] == codes
    to_f4(rows, F32(1), np.zeros((1, 1), F32), (1, 16), out)
    assert not out.any()


def test_integers_by_hand() -> None:
    rows = np.array([[7.5, 0.5, 1.5, -8.0, -9.0, 2.4, 100.0]], F32)
    out = np.empty(rows.shape, np.int8)
    to_integers(rows, np.ones((1, 1), F32), (1, 7), 4, out)
    assert out.tolist() == [[7, 0, 2, -8, -8, 2, 7]]
    words = np.full(4, 255, np.uint8)
    pack(out, 4, words)
    assert words.tolist() == [15 | 8 << 4, 10, 0 | 10 << 4, 15]  # u = q + 8, the first in the low nibble
    assert scales_of_integers(np.array([15.0, 0.0, 2.0**-149], F32), 4, "BF16").tolist() == [
        2.0,
        1.0,
        2.0**-133,
    ]


@pytest.mark.parametrize("block", [(1, 16), (2, 4), (4, 64)])
def test_small_codes_are_the_same_with_and_without_a_compiler(
    block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = matrix(4, 64)
    divisors = block_peaks(rows, block) / F32(6)
    divisors[0, 0] = 0
    scales = scales_of_integers(block_peaks(rows, block), 5, "F32")
    found = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(encoding, "is_compiled", lambda name: False)
        out, codes = np.empty(128, np.uint8), np.empty(rows.shape, np.int8)
        to_f4(rows, F32(0.75), divisors, block, out)
        to_integers(rows, scales, block, 5, codes)
        found.append((out.tolist(), codes.tolist()))
    assert found[0] == found[1]


def test_scales_of_nvfp4_at_their_ends() -> None:
    # A group far below the largest has the scale zero, and zeros; a tensor of zeros has the scale one, and so have its groups.
    for divides in (True, False):
        whole = nvfp4_whole(1.0, divides=divides)
        assert whole == (F32(2688) if divides else F32(1) / F32(2688))
        found = scales_of_nvfp4(np.array([[1.0], [1e-9], [0.0]], F32), whole, divides=divides)
        assert found.groups.ravel().tolist() == [448.0, 0.0, 1.0]
        assert nvfp4_whole(0.0, divides=divides) == 1
        assert 0 < nvfp4_whole(2.0**-149, divides=divides) < np.inf


@given(st.floats(2.0**-149, 2.0**127, width=32), st.sampled_from([2, 8]))
def test_scales_of_mx_are_the_power_of_two_of_the_largest(peak: float, largest_exponent: int) -> None:
    floor = math.floor(math.log2(peak))
    floor -= 2.0**floor > peak  # where the logarithm is rounded up
    want = 2.0 ** max(-127, floor - largest_exponent)
    assert scales_of_mx(np.array([peak], F32), largest_exponent).tolist() == [want]
