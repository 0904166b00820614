"""FP8 to bf16 by a table of its 256 codes, and fp32 to FP8 by one rounding to nearest even, as torch casts.

What lies beyond the largest number overflows and is refused, as in every other dtype. With --nonfinite warn it becomes
infinite in F8_E5M2, and the largest number in F8_E4M3, which has no infinity.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.refs.float8 import WIDENED_BLOCK, WidenedRef
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.tensors.made import read_to, reads
from streammerge.tensors.scratch import BYTE, Scratch

_STEP = 1 << 15
"""Elements rounded together."""
_BITS = {"F8_E4M3": (4, 3), "F8_E5M2": (5, 2)}
"""Bits of exponent and mantissa."""
_LARGEST = {"F8_E4M3": 0x7E, "F8_E5M2": 0x7B}
"""Code of the largest number: 448, 57344."""
_BEYOND = {"F8_E4M3": 464.0, "F8_E5M2": 61440.0}
"""The largest value that rounds to it, or would in a format without an end."""
_INFINITE = 0x7C
"""Of F8_E5M2."""


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


@reads(WidenedRef)
def _read_widened(
    reader: Reader, ref: WidenedRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    codes = scratch.take((WIDENED_BLOCK,), BYTE)
    out = target[: 2 * (stop - start)].view(np.uint16)
    of = table(ref.source.dtype)
    for first in range(start, stop, WIDENED_BLOCK):
        last = min(stop, first + WIDENED_BLOCK)
        read_to(reader, ref.source, first, last, codes, scratch.rest())
        np.take(of, codes[: last - first], out=out[first - start : last - start])


def narrow(values: NDArray[np.float32], dtype: str, out: Bytes) -> tuple[int, int]:
    """Round fp32 values to FP8 at the beginning of `out`, which may be their own bytes.

    Returns how many of the codes are no finite number, and how many finite values were beyond the largest.
    """
    bad = clipped = 0
    beyond = np.float32(_BEYOND[dtype])
    for first in range(0, values.size, _STEP):
        block = values[first : first + _STEP]
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
    # A number whose last place is the spacing of FP8 subnormals: adding it rounds to that spacing.
    anchor = np.float32(2.0 ** (1 - bias - mantissa_bits + 23))
    small = (magnitude.view(np.float32) + anchor).view(np.uint32) - anchor.view(np.uint32)
    codes = np.where(magnitude < np.uint32((127 + 1 - bias) << 23), small, normal)
    codes = np.minimum(codes, np.uint32(_LARGEST[dtype] if dtype == "F8_E4M3" else _INFINITE))
    if dtype == "F8_E5M2":
        codes = np.where(magnitude >= np.uint32((127 + 16) << 23), np.uint32(_INFINITE), codes)
    codes = np.where(magnitude > np.uint32(0x7F800000), np.uint32(0x7F), codes)
    return (codes | ((bits >> np.uint32(24)) & np.uint32(0x80))).astype(np.uint8)
