"""Codes and scales of quantised tensors, made of fp32 values by single fp32 operations, each rounded to nearest even.

Compiled loops make the codes where they are compiled, numpy where they are not: the same bits. Scales are few, and
numpy's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streammerge.numerics.casts import Bytes, from_bf16, rounded, rounded8, table, to_bf16
from streammerge.numerics.compiled import is_compiled
from streammerge.records import dataclass

F8_GROUP = "encoding_f8"
"""The group of kernels that makes FP8 codes."""
SMALL_GROUP = "encoding_small"
"""The group of kernels that makes codes of 4 bits, and integers."""
Values = NDArray[np.float32]
_F8_LARGEST = np.float32(448.0)
_LEAST = {
    "F32": np.float32(2.0**-149),
    "BF16": np.float32(2.0**-133),
    "F16": np.float32(2.0**-24),
    "F8_E8M0": np.float32(2.0**-127),
    "U8": np.float32(2.0**-127),
    "F8_E4M3": np.float32(2.0**-9),
}
"""The least positive number of each dtype that scales have; bytes hold the exponent of a power of two."""
_EXPONENTS = {
    "F32": (-127, 127),
    "BF16": (-127, 127),
    "F16": (-24, 15),
    "F8_E8M0": (-127, 127),
    "U8": (-127, 127),
}
"""The exponents of scales that are powers of two: those of F8_E8M0, as far as the dtype has them."""


def block_peaks(rows: Values, block: tuple[int, int]) -> Values:
    """Return the largest magnitude of each block of finite values (n, columns): as many as there are blocks, partial ones too."""
    height, width = block
    n, columns = rows.shape
    grid = -(-n // height), -(-columns // width)
    if is_compiled(F8_GROUP):
        from streammerge.numerics.encoding_loops import largest_patterns

        patterns = np.zeros(grid, np.uint32)
        largest_patterns(rows.view(np.uint32), height, width, patterns)
        return patterns.view(np.float32)
    peaks = np.zeros(grid, np.float32)
    starts = np.arange(0, columns, width)
    for i in range(n):
        np.maximum(peaks[i // height], np.maximum.reduceat(np.abs(rows[i]), starts), out=peaks[i // height])
    return peaks


def scales_of_f8(peaks: Values, dtype: str, *, powers: bool = False) -> Values:
    """Return the scale of each group from its largest magnitude a: a / 448 as its dtype holds it.

    With `powers`, and in the dtypes of exponents, it is the least power of two that is not below. A group of zeros
    has 1, a scale that underflows is the least positive number of its dtype.
    """
    quotients = peaks / _F8_LARGEST
    if powers or dtype in ("F8_E8M0", "U8"):
        fraction, exponent = np.frexp(quotients)
        exponent = np.where(fraction == 0.5, exponent - 1, exponent)
        exponent = np.clip(np.where(quotients == 0, -127, exponent), *_EXPONENTS[dtype])
        scales = np.ldexp(np.float32(1.0), exponent).astype(np.float32)
    else:
        scales = _held(quotients, dtype)
    scales = np.where(scales == 0, _LEAST[dtype], scales)
    return np.where(peaks == 0, np.float32(1.0), scales)


def scales_of_mx(peaks: Values, largest_exponent: int) -> Values:
    """Return the scale of each group of MXFP4 (2) or MXFP8 (8): 2 to the floor of log2 of its largest magnitude, less that."""
    exponent = np.clip(np.frexp(peaks)[1] - 1 - largest_exponent, -127, 127)
    return np.where(peaks == 0, np.float32(1.0), np.ldexp(np.float32(1.0), exponent)).astype(np.float32)


def _held(values: Values, dtype: str) -> Values:
    """Return fp32 values rounded to a dtype, in fp32."""
    if dtype == "BF16":
        return (to_bf16(values).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "F16":
        return np.minimum(values, np.float32(65504.0)).astype(np.float16).astype(np.float32)
    return values


def store_scales(scales: Values, dtype: str) -> Bytes:
    """Return scales, which their dtype holds exactly, as its bytes."""
    if dtype in ("F8_E8M0", "U8"):
        return (np.frexp(scales)[1] + 126).astype(np.uint8).reshape(-1)
    if dtype == "F8_E4M3":
        return rounded8(np.ascontiguousarray(scales).reshape(-1), dtype)
    return rounded(scales.astype(np.float64).reshape(-1), dtype)


def to_f8(rows: Values, scales: Values, block: tuple[int, int], out: Bytes) -> None:
    """Write the F8_E4M3 codes of finite values (n, columns) divided by the scales of their blocks, saturated."""
    codes = out.reshape(rows.shape)
    height, width = block
    if is_compiled(F8_GROUP):
        from streammerge.numerics.encoding_loops import write_f8

        write_f8(rows, scales, height, width, codes)
        return
    n, columns = rows.shape
    for row in range(n):
        spread = np.repeat(scales[row // height], width)[:columns]
        with np.errstate(over="ignore"):
            codes[row] = rounded8(rows[row] / spread, "F8_E4M3")


# --- scales of other formats


def scales_of_integers(peaks: Values, bits: int, dtype: str) -> Values:
    """Return the scale of each group of symmetric integers: a / (2^(bits - 1) - 0.5), as its dtype holds it."""
    scales = _held(peaks / np.float32(2.0 ** (bits - 1) - 0.5), dtype)
    scales = np.where(scales == 0, _LEAST[dtype], scales)
    return np.where(peaks == 0, np.float32(1.0), scales)


@dataclass(frozen=True)
class Nvfp4Scales:
    """The scales of NVFP4: one of the whole, and one for each group."""

    whole: np.float32
    groups: Values
    """Numbers of F8_E4M3; 0 where they underflow."""
    factor: np.float32
    """Values are multiplied by it,"""
    divisors: Values
    """and divided by these: then they are codes, once rounded."""


def nvfp4_whole(peak: float, *, divides: bool) -> np.float32:
    """Return the scale of the whole from its largest magnitude: 2688 / it where decoding divides, else it / 2688."""
    if peak == 0:
        return np.float32(1.0)
    if divides:
        with np.errstate(over="ignore"):
            return min(np.float32(2688.0) / np.float32(peak), np.finfo(np.float32).max)
    return max(np.float32(peak) / np.float32(2688.0), _LEAST["F32"])


def scales_of_nvfp4(peaks: Values, whole: np.float32, *, divides: bool) -> Nvfp4Scales:
    """Return the scale of each group of 16 from its largest magnitude."""
    six = np.float32(6.0)
    groups = _as_f8((peaks * whole) / six if divides else (peaks / six) / whole)
    groups = np.where(peaks == 0, np.float32(1.0), groups)
    if divides:
        return Nvfp4Scales(whole, groups, whole, groups)
    return Nvfp4Scales(whole, groups, np.float32(1.0), groups * whole)


def _as_f8(values: Values) -> Values:
    flat = np.ascontiguousarray(values).reshape(-1)
    return from_bf16(table("F8_E4M3")[rounded8(flat, "F8_E4M3")]).reshape(values.shape)


# --- codes of 4 bits, and integers


def to_f4(rows: Values, factor: np.float32, divisors: Values, block: tuple[int, int], out: Bytes) -> None:
    """Write the E2M1 codes of finite values (n, columns) times a factor, over the divisors of their blocks, saturated.

    The first of two lies in the low nibble. Where a divisor is zero, so are the codes.
    """
    n, columns = rows.shape
    height, width = block
    pairs = out.reshape(n, columns // 2)
    if is_compiled(SMALL_GROUP):
        from streammerge.numerics.encoding_loops import write_f4

        write_f4(rows, factor, divisors, height, width, pairs)
        return
    for i, row in enumerate(rows):
        spread = np.repeat(divisors[i // height], width)[:columns]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            size = np.abs(row * factor / spread)
        codes = sum((size > bound).astype(np.uint8) for bound in (0.25, 1.25, 2.5, 5.0))
        codes = codes + sum((size >= bound).astype(np.uint8) for bound in (0.75, 1.75, 3.5))
        codes = np.where(spread == 0, 0, codes | ((row < 0).astype(np.uint8) << 3)).astype(np.uint8)
        pairs[i] = codes[::2] | (codes[1::2] << 4)


def to_integers(
    rows: Values, scales: Values, block: tuple[int, int], bits: int, codes: NDArray[np.int8]
) -> None:
    """Write finite values (n, columns) divided by the scales of their blocks, as integers of some bits, saturated."""
    height, width = block
    if is_compiled(SMALL_GROUP):
        from streammerge.numerics.encoding_loops import write_integers

        write_integers(rows, scales, height, width, bits, codes)
        return
    least, largest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    for i, row in enumerate(rows):
        spread = np.repeat(scales[i // height], width)[: row.size]
        codes[i] = np.clip(np.rint(row / spread), least, largest)


def pack(codes: NDArray[np.int8], bits: int, out: Bytes) -> None:
    """Write integers (n, columns) plus half their range: c at bit ``c * bits`` of its row, which is filled with zeros.

    `out` has whole words for each row.
    """
    n, columns = codes.shape
    words = out.reshape(n, -1)
    unsigned = codes.view(np.uint8) + np.uint8(1 << (bits - 1))  # modulo 256
    if bits in (4, 8):
        of_byte = 8 // bits
        words[:, -(-columns // of_byte) :] = 0
        words[:, : -(-columns // of_byte)] = unsigned[:, ::of_byte]
        if bits == 4:
            words[:, : columns // 2] |= unsigned[:, 1::2] << 4
        return
    places = np.arange(bits, dtype=np.uint8)
    for i in range(n):
        packed = np.packbits((unsigned[i, :, None] >> places) & 1, bitorder="little")
        words[i, : packed.size], words[i, packed.size :] = packed, 0
