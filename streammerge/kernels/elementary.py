"""exp and log with the steps and the bits of ``numerics/elementary.py``, on any CPU."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from streammerge.kernels import njit
from streammerge.numerics.elementary import (
    EXP_TERMS,
    LEAST,
    LN2_HIGH,
    LN2_LOW,
    LOG_TERMS,
    PER_LN2,
    ROOT_HALF_BITS,
    SHIFT,
    SHIFT_BITS,
)

_E13, _E12, _E11, _E10, _E9, _E8, _E7, _E6, _E5, _E4, _E3, _E2, _E1, _E0 = EXP_TERMS
_L23, _L21, _L19, _L17, _L15, _L13, _L11, _L9, _L7, _L5, _L3, _L1 = LOG_TERMS


@intrinsic
def _f64_from_bits(typing_context, bits):
    """Reinterpret an int64 as float64."""

    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), build


@intrinsic
def _bits_from_f64(typing_context, value):
    """Reinterpret a float64 as int64."""

    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(64))

    return types.int64(types.float64), build


@njit(inline="always")
def exp(x):
    """Return e to the power of `x`, fp64 and not above 0."""
    x = LEAST if x < LEAST else x
    shifted = x * PER_LN2 + SHIFT
    k = shifted - SHIFT
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    # Unrolled: a loop over the terms would prevent the vectorisation of the loop over elements.
    total = _E13 * r + _E12
    total = total * r + _E11
    total = total * r + _E10
    total = total * r + _E9
    total = total * r + _E8
    total = total * r + _E7
    total = total * r + _E6
    total = total * r + _E5
    total = total * r + _E4
    total = total * r + _E3
    total = total * r + _E2
    total = total * r + _E1
    total = total * r + _E0
    power = (_bits_from_f64(shifted) - np.int64(SHIFT_BITS) + np.int64(1023)) << np.int64(52)
    return total * _f64_from_bits(power)


@njit(inline="always", error_model="numpy")
def log(y):
    """Return the natural logarithm of `y`, fp64, normal and positive."""
    # Unsigned, and converted to float through its bits: vector instructions exist for these shifts and conversions.
    bits = _bits_from_f64(y)
    biased = (np.uint64(bits) - np.uint64(ROOT_HALF_BITS) + (np.uint64(1024) << np.uint64(52))) >> np.uint64(
        52
    )
    k = _f64_from_bits(np.int64(biased | np.uint64(0x4330000000000000))) - (2.0**52 + 1024.0)
    m = _f64_from_bits(bits - np.int64((biased - np.uint64(1024)) << np.uint64(52)))
    f = (m - 1.0) / (m + 1.0)
    s = f * f
    total = _L23 * s + _L21
    total = total * s + _L19
    total = total * s + _L17
    total = total * s + _L15
    total = total * s + _L13
    total = total * s + _L11
    total = total * s + _L9
    total = total * s + _L7
    total = total * s + _L5
    total = total * s + _L3
    total = total * s + _L1
    return k * LN2_HIGH + ((2.0 * f) * total + k * LN2_LOW)
