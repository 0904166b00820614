"""Codes and scales by the rules that are written down, against a plain numpy of the test's own and against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streammerge.numerics import encoding
from streammerge.numerics.encoding import block_peaks, scales_of_f8, store_scales, to_f8

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
