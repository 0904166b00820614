"""The loops of `streammerge.numerics.encoding`, compiled: codes of quantised tensors, a row at a time."""

import numpy as np

from streammerge.numerics.jit import njit

_AT_ONCE = 512
"""Quotients that are kept between the division and the rounding."""
_LARGEST = np.uint32(0x7E)
_LEAST_NORMAL = np.uint32(121 << 23)
_ANCHOR = np.float32(2.0**14)
"""A number whose last place is the spacing of the subnormals of F8_E4M3."""
_ANCHOR_BITS = np.uint32(0x46800000)


@njit(nogil=True)
def largest_patterns(patterns, height, width, out):
    """Take the largest magnitude of each block of a matrix into account.

    =========  ===================  ===================================================
    patterns   uint32 (rows, n)     of finite fp32 numbers
    out        uint32 (grid rows, grid columns)  raised to the pattern of the largest
    =========  ===================  ===================================================
    """
    rows, columns = patterns.shape
    for i in range(rows):
        for g in range(out.shape[1]):
            row = patterns[i, g * width : min(columns, (g + 1) * width)]
            top = np.uint32(0)
            for j in range(row.size):
                top = max(top, np.uint32(row[j] & np.uint32(0x7FFFFFFF)))
            out[i // height, g] = max(out[i // height, g], top)


@njit(nogil=True)
def write_f8(values, scales, height, width, out):
    """Write values divided by the scales of their blocks as codes of F8_E4M3, rounded to nearest even and saturated.

    ======  ======================================  ===============
    values  float32 (rows, n)                       finite
    scales  float32 (grid rows, grid columns)       above zero
    out     uint8 (rows, n)                         written
    ======  ======================================  ===============
    """
    rows, columns = values.shape
    quotients, shifted = np.empty(_AT_ONCE, np.float32), np.empty(_AT_ONCE, np.float32)
    bits, small = quotients.view(np.uint32), shifted.view(np.uint32)
    for i in range(rows):
        for g in range(scales.shape[1]):
            scale = scales[i // height, g]
            end = min(columns, (g + 1) * width)
            for first in range(g * width, end, _AT_ONCE):
                n = min(_AT_ONCE, end - first)
                row, codes = values[i, first : first + n], out[i, first : first + n]
                for j in range(n):
                    quotients[j] = row[j] / scale
                for j in range(n):
                    shifted[j] = abs(quotients[j]) + _ANCHOR
                for j in range(n):
                    size = np.uint32(bits[j] & np.uint32(0x7FFFFFFF))
                    odd = np.uint32((size >> np.uint32(20)) & np.uint32(1))
                    near = np.uint32(size - np.uint32(120 << 23) + np.uint32(0x7FFFF)) + odd
                    normal = np.uint32(np.uint32(near) >> np.uint32(20))
                    code = normal if size >= _LEAST_NORMAL else np.uint32(small[j] - _ANCHOR_BITS)
                    code = min(code, _LARGEST)
                    codes[j] = np.uint8(code | ((bits[j] >> np.uint32(24)) & np.uint32(0x80)))
