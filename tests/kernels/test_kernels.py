"""The fused kernels against exact oracles: integers and fractions, never another float."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streammerge.kernels.blocks import round_out, widen
from streammerge.kernels.operands import CODES, Operand
from streammerge.numerics.casts import round_to

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FORMATS = {"BF16": (8, -126, 127), "F16": (11, -14, 15), "F32": (24, -126, 127)}
"""Precision, least and greatest exponent of a normal number."""


# --- widening


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_widening_is_exact_for_all_65536_patterns(dtype: str) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    out = np.empty(1 << 16, np.float32)
    widen(Operand(patterns, patterns.view(np.uint32), 0, CODES[dtype]), 0, 1 << 16, out)
    expected = torch.from_numpy(patterns.view(np.int16)).view(TORCH[dtype]).float().numpy()
    number = ~np.isnan(expected)
    assert (out[number].view(np.uint32) == expected[number].view(np.uint32)).all()
    assert np.isnan(out[~number]).all()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20), st.integers(0, 5))
def test_fp32_passes_through_bit_for_bit_at_any_offset(patterns: list[int], before: int) -> None:
    arena = np.array([0] * before + patterns, np.uint32)
    out = np.empty(len(patterns), np.float32)
    widen(Operand(arena.view(np.uint16), arena, 0, CODES["F32"]), before, len(patterns), out)
    assert out.view(np.uint32).tolist() == patterns


# --- rounding


def exactly_rounded(value: float, dtype: str) -> float:
    """Round to nearest, ties to even, by fractions alone; overflow from half an ulp above the greatest."""
    precision, least, greatest = FORMATS[dtype]
    if value == 0 or not np.isfinite(value):
        return value
    exact = abs(Fraction(value))
    exponent = max(np.frexp(abs(value))[1] - 1, least)
    unit = Fraction(2) ** (int(exponent) - (precision - 1))
    rounded = round(exact / unit) * unit  # Fraction.__round__: ties to even
    limit = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** greatest
    magnitude = np.inf if rounded > limit else float(rounded)
    return float(np.copysign(magnitude, value))


def rounded_by_kernel(values: np.ndarray, dtype: str) -> tuple[np.ndarray, int]:
    """Return the bits, and the number of values that are not finite."""
    arena = np.zeros(len(values) + 2, np.uint32)
    out = Operand(arena.view(np.uint16), arena, 0, CODES[dtype])
    bad = round_out(values, len(values), out, 0)
    width = np.uint32 if dtype == "F32" else np.uint16
    return arena.view(width)[: len(values)].copy(), bad


def bits_of(values: Sequence[float], dtype: str) -> np.ndarray:
    """Return the bits of values that the format holds exactly."""
    tensor = torch.tensor(list(values), dtype=torch.float64).to(TORCH[dtype])
    if dtype == "F32":
        return tensor.view(torch.int32).numpy().view(np.uint32)
    return tensor.view(torch.int16).numpy().view(np.uint16)


def check_rounding(values: np.ndarray, dtype: str) -> None:
    expected = [exactly_rounded(float(v), dtype) for v in values]
    bits, bad = rounded_by_kernel(values, dtype)
    assert (bits == bits_of(expected, dtype)).all()
    assert bad == sum(not np.isfinite(v) for v in expected)
    by_torch = round_to(torch.from_numpy(values), dtype)
    width = torch.int32 if dtype == "F32" else torch.int16
    assert (by_torch.view(width).numpy().view(bits.dtype) == bits).all()


def neighbours(values: np.ndarray) -> np.ndarray:
    """The values, the fp64 and fp32 numbers next to them, and all negated."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
        near = [values, np.nextafter(values, np.inf), np.nextafter(values, -np.inf)]
        near += [np.nextafter(single, np.float32(s)).astype(np.float64) for s in (np.inf, -np.inf)]
        near += [np.nextafter(near[-1], np.inf), np.nextafter(near[-2], -np.inf)]
    everything = np.concatenate(near)
    everything = everything[np.isfinite(everything)]
    return np.concatenate([everything, -everything])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_sixteen_bit_number_and_every_halfway_case_round_exactly(dtype: str) -> None:
    # All non-negative finite patterns, subnormals included, and the midpoint above each.
    patterns = np.arange(0x7F80 if dtype == "BF16" else 0x7C00, dtype=np.uint16)
    numbers = torch.from_numpy(patterns.view(np.int16)).view(TORCH[dtype]).double().numpy()
    precision, _, greatest = FORMATS[dtype]
    above = np.append(numbers[1:], 2.0 ** (greatest + 1))
    middle = (numbers + above) / 2
    even = np.where(patterns % 2 == 0, patterns, patterns + 1)
    for values, expected in [
        (numbers, patterns),
        (middle, even),
        (np.nextafter(middle, np.inf), patterns + 1),
        (np.nextafter(middle, -np.inf), patterns),
        # A double-rounding trap: the nearest fp32 number is the midpoint itself.
        (middle + (above - numbers) * 2.0**-25, patterns + 1),
        (middle - (above - numbers) * 2.0**-25, patterns),
    ]:
        bits, _ = rounded_by_kernel(values, dtype)
        assert (bits == expected).all()
        assert (
            round_to(torch.from_numpy(values), dtype).view(torch.int16).numpy().view(np.uint16) == bits
        ).all()
        negative, _ = rounded_by_kernel(-values, dtype)
        assert (negative == (expected | 0x8000)).all()
    assert precision in (8, 11)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rounding_is_exact_around_every_edge_of_a_format(dtype: str) -> None:
    precision, least, greatest = FORMATS[dtype]
    exponents = np.array(
        [
            least - precision - 1,
            least - precision,
            least - precision + 1,
            least - 1,
            least,
            least + 1,
            -1,
            0,
            1,
            greatest - 1,
            greatest,
        ]
    )
    fractions = np.array([1.0, 1.5, 1.25, 2 - 2.0 ** (1 - precision), 2 - 2.0**-precision, 1 + 2.0**-precision,
                          1 + 3 * 2.0**-precision, 1 + 2.0**-precision + 2.0**-30])  # fmt: skip
    values = np.ldexp(fractions[:, None], exponents[None, :]).ravel()
    tiny = np.array([0.0, 5e-324, 1e-310, 2.0**-149, 2.0**-150, 2.0**-150 * (1 + 2.0**-40), 2.0**-151, 2.0**-134,
                     2.0**-24, 2.0**-25, 2.0**-25 * 1.001, 1e300, 65519.99, 65520.0, 3.4028235677973366e38])  # fmt: skip
    check_rounding(neighbours(np.concatenate([values, tiny])), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@given(values=st.lists(st.floats(allow_nan=False), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_rounding_is_exact_for_any_fp64_value(dtype: str, values: list[float]) -> None:
    check_rounding(np.array(values), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@given(mantissa=st.integers(2**24, 2**25 - 1), low=st.integers(-3, 3), exponent=st.integers(-160, 140))
@example(mantissa=2**24 + 2**16, low=1, exponent=0)
@settings(max_examples=100, deadline=None)
def test_rounding_is_exact_next_to_fp32_halfway_cases(
    dtype: str, mantissa: int, low: int, exponent: int
) -> None:
    value = np.ldexp(float(mantissa * 2**28 + low), exponent - 52)  # 53 bits: fp32 sees all but the last few
    check_rounding(np.array([value, -value]), dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_nan_becomes_the_canonical_one_and_is_counted(dtype: str) -> None:
    patterns = np.array(
        [0x7FF8000000000000, 0xFFF8000000000001, 0x7FF0000000000001, 0x7FFFFFFFFFFFFFFF], np.uint64
    )
    bits, bad = rounded_by_kernel(patterns.view(np.float64), dtype)
    assert bad == 4
    assert set(bits.tolist()) == {{"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}[dtype]}
