"""A plain float64 decoder of quantised tensors, written from the formats' definitions and not from the package."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def float8(code: int, dtype: str) -> float:
    """Return the value of one FP8 code."""
    exponent_bits, mantissa_bits, bias = (4, 3, 7) if dtype == "F8_E4M3" else (5, 2, 15)
    sign = -1.0 if code & 0x80 else 1.0
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    if dtype == "F8_E4M3" and code & 0x7F == 0x7F:
        return math.nan
    if dtype == "F8_E5M2" and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits)


def e8m0(code: int) -> float:
    """Return the value of one E8M0 code."""
    return math.nan if code == 255 else math.ldexp(1.0, code - 127)


def float8_values(codes: NDArray[np.uint8], dtype: str) -> NDArray[np.float64]:
    """Return the values of FP8 codes."""
    return np.array([float8(code, dtype) for code in range(256)])[codes]


def e8m0_values(codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the values of E8M0 codes."""
    return np.array([e8m0(code) for code in range(256)])[codes]


def spread(
    scales: NDArray[np.float64], shape: tuple[int, ...], block: tuple[int, ...]
) -> NDArray[np.float64]:
    """Return the scale of each element, by blocks; those at the end of an axis may be cut."""
    for axis, size in enumerate(block):
        scales = scales.repeat(size, axis).take(range(shape[axis]), axis)
    return scales


def cuts(n: int, seed: int = 1) -> Iterator[tuple[int, int]]:
    """Yield ranges of a tensor of n elements: all of it, its ends, and others."""
    yield 0, n
    yield from ((0, 1), (n - 1, n), (n // 2, n // 2 + 1))
    chosen = np.random.default_rng(seed)
    for _ in range(40):
        first, last = sorted(chosen.integers(0, n + 1, 2).tolist())
        if first < last:
            yield first, last
