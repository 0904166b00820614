"""Codes and scales of quantised tensors, made of fp32 values by single fp32 operations, each rounded to nearest even.

Compiled loops make the codes where they are compiled, numpy where they are not: the same bits. Scales are few, and
numpy's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streammerge.numerics.casts import Bytes, rounded, rounded8, to_bf16
from streammerge.numerics.compiled import is_compiled

F8_GROUP = "encoding_f8"
"""The group of kernels that makes FP8 codes."""
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
    padded = np.zeros((grid[0] * height, grid[1] * width), np.float32)
    np.abs(rows, out=padded[:n, :columns])
    return np.asarray(padded.reshape(grid[0], height, grid[1], width).max(axis=(1, 3)))


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
