"""Casts between bf16, fp16, fp32, fp64 and FP8: widening is exact, narrowing rounds once to nearest even.

FP8 is widened to bf16 by a table of its 256 codes, and rounded from fp32 as torch casts. A value beyond the largest
number overflows and is refused, as in every other dtype. With --nonfinite warn it becomes infinity in F8_E5M2, and the
largest number in F8_E4M3, which has no infinity.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import CONFIG_NAME, NUMPY

if TYPE_CHECKING:
    import torch

Floats = NDArray[Any]
Bytes = NDArray[np.uint8]
BYTE = np.dtype(np.uint8)
F32 = np.dtype(np.float32)
F64 = np.dtype(np.float64)
_NAN16 = np.uint32(0x7FC0)
_AT_ONCE = 1 << 15
"""Number of elements rounded together."""
_BITS = {"F8_E4M3": (4, 3), "F8_E5M2": (5, 2)}
"""Bits of the exponent and of the mantissa."""
_LARGEST = {"F8_E4M3": 0x7E, "F8_E5M2": 0x7B}
"""Code of the largest finite number: 448 and 57344."""
_BEYOND = {"F8_E4M3": 464.0, "F8_E5M2": 61440.0}
"""The largest value that rounds to the largest finite number."""
_INFINITE = 0x7C
"""Code of infinity in F8_E5M2."""


def widened(raw: NDArray[Any], dtype: str, to: np.dtype[Any]) -> Floats:
    """Return elements in a wider dtype, exactly, as a flat array."""
    raw = raw.reshape(-1)
    if dtype == "BF16":
        return from_bf16(raw.view(np.uint16)).astype(to, copy=False)
    return raw.view(NUMPY[dtype]).astype(to, copy=False)


def from_bf16(patterns: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return the values of bf16 patterns in fp32, exactly."""
    return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bf16 patterns of fp32 values, rounded to nearest even; every NaN becomes one NaN."""
    return _bf16(values.view(np.uint32), np.isnan(values))


def _bf16(bits: NDArray[np.uint32], nan: NDArray[np.bool_]) -> NDArray[np.uint16]:
    near = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(nan, _NAN16, near).astype(np.uint16)


def odd_bits(values: NDArray[np.float64]) -> NDArray[np.uint32]:
    """Return fp64 values as fp32 patterns, rounded to odd, so that a later rounding to fewer bits is not a double rounding."""
    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    wide = near.astype(F64)
    away = (np.abs(wide) > np.abs(values)).astype(np.uint32)
    return np.where(wide != values, (bits - away) | np.uint32(1), bits)


def rounded(values: NDArray[np.float64], dtype: str) -> Bytes:
    """Return fp64 values rounded once, to nearest even, as the bytes of a dtype."""
    with np.errstate(over="ignore"):
        if dtype != "BF16":
            return values.astype(NUMPY[dtype]).view(np.uint8)
        bits = odd_bits(values)
    return _bf16(bits, np.isnan(values)).view(np.uint8)


def torch_dtype(dtype: str) -> torch.dtype:
    """Return torch's dtype of a float dtype."""
    import torch

    found: torch.dtype = getattr(torch, CONFIG_NAME[dtype])
    return found


def round_to(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Round once, to nearest even, to an output dtype; fp64 does not pass through a rounded fp32.

    torch casts fp64 to 16 bits through fp32, which rounds twice. Here the intermediate fp32 is rounded to odd,
    so that the result equals one rounding of the fp64 value.
    """
    import torch

    target = torch_dtype(dtype)
    if values.dtype != torch.float64 or target.itemsize != 2:
        return values.to(target)
    if dtype != "BF16":
        return _rounded_to_odd(values).to(target)
    # Only an fp32 in the middle of two bf16 numbers, one of 2**16, can lie on another side of it than the fp64 value.
    single = values.float()
    middle = ((single.view(torch.int32) & 0xFFFF) == 0x8000).nonzero(as_tuple=True)
    single[middle] = _rounded_to_odd(values[middle])
    return single.to(target)


def _rounded_to_odd(values: torch.Tensor) -> torch.Tensor:
    import torch

    single = values.float()
    bits = single.view(torch.int32)
    inexact = (single.double() != values) & ~torch.isnan(values)
    away = single.double().abs() > values.abs()
    odd = (bits - away.int()) | 1
    return torch.where(inexact, odd, bits).view(torch.float32)


def to_store(values: NDArray[Any], source: str, dtype: str) -> NDArray[Any]:
    """Return values in the dtype of a store (F32, or BF16 as patterns), rounded once; fp16 and bf16 widen exactly.

    Parameters
    ----------
    source
        Dtype of `values`; bf16 values are patterns.
    """
    if source == dtype:
        return values
    if source == "BF16":
        return from_bf16(values)
    with np.errstate(over="ignore"):  # an infinity is refused where the sums are taken
        single = values.astype(np.float32)
    return single if dtype == "F32" else to_bf16(single)


@functools.cache
def table(dtype: str) -> NDArray[np.uint16]:
    """Return the bf16 pattern of each code."""
    exponent_bits, mantissa_bits = _BITS[dtype]
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent = (codes & 0x7F) >> mantissa_bits
    mantissa = codes & ((1 << mantissa_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    steps = np.where(exponent > 0, mantissa + (1 << mantissa_bits), mantissa)
    values = sign * np.ldexp(steps.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_bits)
    patterns = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    signs = ((codes & 0x80) << 8).astype(np.uint16)
    if dtype == "F8_E4M3":
        patterns[(codes & 0x7F) == 0x7F] = 0x7FC0
    else:
        patterns[(codes & 0x7F) > 0x7C] = 0x7FC0
        patterns[(codes & 0x7F) == 0x7C] = 0x7F80
    special = (patterns & 0x7F80) == 0x7F80
    patterns[special] |= signs[special]
    return patterns


def narrow(values: NDArray[np.float32], dtype: str, out: Bytes) -> tuple[int, int]:
    """Round fp32 values to FP8 into the beginning of `out`, which may share their memory.

    Returns the number of non-finite codes, and the number of finite values that overflowed.
    """
    bad = clipped = 0
    beyond = np.float32(_BEYOND[dtype])
    for first in range(0, values.size, _AT_ONCE):
        block = values[first : first + _AT_ONCE]
        codes = rounded8(block, dtype)
        size = np.abs(block)
        clipped += int(np.count_nonzero((size > beyond) & (size < np.inf)))
        out[first : first + codes.size] = codes
        bad += int(np.count_nonzero((codes & 0x7F) > _LARGEST[dtype]))
    return bad, clipped


def rounded8(values: NDArray[np.float32], dtype: str) -> Bytes:
    """Return fp32 values rounded to the nearest FP8 number, ties to even."""
    exponent_bits, mantissa_bits = _BITS[dtype]
    bias = (1 << (exponent_bits - 1)) - 1
    drop = 23 - mantissa_bits
    bits = values.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    odd = (magnitude >> np.uint32(drop)) & np.uint32(1)
    normal = (
        magnitude - np.uint32((127 - bias) << 23) + np.uint32((1 << (drop - 1)) - 1) + odd
    ) >> np.uint32(drop)
    # One unit in the last place of this number is the spacing of FP8 subnormals: adding it rounds to that spacing.
    anchor = np.float32(2.0 ** (1 - bias - mantissa_bits + 23))
    small = (magnitude.view(np.float32) + anchor).view(np.uint32) - anchor.view(np.uint32)
    codes = np.where(magnitude < np.uint32((127 + 1 - bias) << 23), small, normal)
    codes = np.minimum(codes, np.uint32(_LARGEST[dtype] if dtype == "F8_E4M3" else _INFINITE))
    if dtype == "F8_E5M2":
        codes = np.where(magnitude >= np.uint32((127 + 16) << 23), np.uint32(_INFINITE), codes)
    codes = np.where(magnitude > np.uint32(0x7F800000), np.uint32(0x7F), codes)
    return (codes | ((bits >> np.uint32(24)) & np.uint32(0x80))).astype(np.uint8)
