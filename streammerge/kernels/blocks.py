"""Building blocks of all kernels, for runs of a few hundred elements that stay in the L1 cache.

Widening and rounding are integer operations on bit patterns; they are exact for bf16 and fp16, and vectorise.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from streammerge.kernels import loop, njit
from streammerge.kernels.operands import BF16, F32
from streammerge.kernels.widths import width_of
from streammerge.numerics.bits import (
    bits_from_f32,
    bits_from_f64,
    f32_from_bits,
    f64_from_bits,
    has_multiply_add,
    multiply_add,
)

BLOCK = 512
"""Number of elements processed at a time: a dozen fp32 and fp64 buffers of this length fit in 32 KiB."""


@intrinsic
def trailing_zeros(typing_context, bits):
    """Return the position of the lowest set bit of a non-zero uint64."""

    def build(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), build


@intrinsic
def ones(typing_context, bits):
    """Return the number of bits of a uint64 that are set."""

    def build(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), build


@intrinsic
def bytes_set(typing_context, address):
    """Return one bit for each of the 64 bytes at an address, set if the byte is not zero."""

    def build(context, builder, signature, args):
        many = ir.VectorType(ir.IntType(8), 64)
        values = builder.load(builder.inttoptr(args[0], many.as_pointer()), align=1)
        return builder.bitcast(builder.icmp_unsigned("!=", values, ir.Constant(many, None)), ir.IntType(64))

    return types.uint64(types.intp), build


@intrinsic
def eight_at_most(typing_context, address, limit):
    """Compare the eight uint32 at an address with a limit; return one bit per number, set if it is <= the limit."""

    def build(context, builder, signature, args):
        eight = ir.VectorType(ir.IntType(32), 8)
        values = builder.load(builder.inttoptr(args[0], eight.as_pointer()), align=4)
        limits = ir.Constant(eight, ir.Undefined)
        for lane in range(8):
            limits = builder.insert_element(limits, args[1], ir.Constant(ir.IntType(32), lane))
        bits = builder.bitcast(builder.icmp_unsigned("<=", values, limits), ir.IntType(8))
        return builder.zext(bits, ir.IntType(64))

    return types.uint64(types.intp, types.uint32), build


@intrinsic
def signs_set(typing_context, address):
    """Return one bit for each of the 64 fp64 at an address, set if its sign is negative."""

    def build(context, builder, signature, args):
        many = ir.VectorType(ir.IntType(64), 64)
        values = builder.load(builder.inttoptr(args[0], many.as_pointer()), align=8)
        return builder.bitcast(builder.icmp_signed("<", values, ir.Constant(many, None)), ir.IntType(64))

    return types.uint64(types.intp), build


@intrinsic
def prefetch(typing_context, address):
    """Ask for the cache line at an address, which need not be readable: nothing is read if it is not."""

    def build(context, builder, signature, args):
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        called = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        told = [ir.Constant(number, value) for value in (0, 3, 1)]  # to read, into all caches, data
        builder.call(called, [builder.inttoptr(args[0], pointer), *told])
        return context.get_dummy_value()

    return types.void(types.intp), build


@loop()
def prefetch_row(address):
    """Ask for 64 elements of 16 bits.

    A loop that alternates between loads and work on what it has loaded stands still for the loads: the processor follows
    sixteen lines at a time, and does not look beyond the work.
    """
    prefetch(address)
    prefetch(address + 64)


@loop()
def widen(operand, first, n, out):
    """Write elements of an operand as fp32; exact for all dtypes.

    =======  ==============  ============================================
    operand  Operand         the input
    first    int64           elements before the first one
    n        int64           number of elements
    out      float32 (>=n,)  written
    =======  ==============  ============================================
    """
    offset = operand.offset + first * width_of(operand.code)
    widen_at(operand.half, operand.full, offset, operand.code, n, out)


@loop()
def widen_at(half, full, offset, code, n, out):
    """Do the same as `widen` at a byte offset; the buffer is given as 16-bit and as 32-bit words."""
    if code == BF16:
        source = half[offset >> 1 : (offset >> 1) + n]
        for i in range(n):
            out[i] = f32_from_bits(np.uint32(source[i]) << np.uint32(16))
    elif code == F32:
        words32 = full[offset >> 2 : (offset >> 2) + n]
        for i in range(n):
            out[i] = f32_from_bits(words32[i])
    else:
        source = half[offset >> 1 : (offset >> 1) + n]
        for i in range(n):
            h = np.uint32(source[i])
            sign = (h & np.uint32(0x8000)) << np.uint32(16)
            magnitude = h & np.uint32(0x7FFF)
            normal = (magnitude << np.uint32(13)) + np.uint32(112 << 23)
            special = (magnitude << np.uint32(13)) + np.uint32(224 << 23)
            small = bits_from_f32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24))
            bits = normal if magnitude < np.uint32(0x7C00) else special
            bits = small if magnitude < np.uint32(0x0400) else bits
            out[i] = f32_from_bits(bits | sign)


@loop()
def _sticky_f32_bits(y):
    """Round fp64 to fp32 by round-to-odd, so that rounding to 16 bits afterwards is not a double rounding."""
    f = np.float32(y)
    bits = bits_from_f32(f)
    inexact = np.float64(f) != y
    away = abs(np.float64(f)) > abs(y)
    return ((bits - np.uint32(away)) | np.uint32(1)) if inexact else bits


@loop()
def _round_to_bf16(values, n, target):
    """Round fp64 values to bf16 where the results are normal numbers or zeros; return whether all of them are.

    The upper 8 bits of a significand of 53 are rounded to nearest even by an integer addition. What is left is exact
    in fp32, whose upper half is the result, unless it is not normal: subnormal results have fewer bits, and are found
    by their size, as are infinities and NaN. A NaN whose pattern the addition carries into the sign is found by that.
    If this returns False, `target` holds nothing of use.
    """
    carried = np.uint64(0)
    for i in range(n):
        bits = bits_from_f64(values[i])
        near = bits + (np.uint64((1 << 44) - 1) + ((bits >> np.uint64(45)) & np.uint64(1)))
        carried |= bits ^ near
        single = bits_from_f32(np.float32(f64_from_bits(near & ~np.uint64((1 << 45) - 1))))
        # The addition changes subnormal fp32 only: those from half of the smallest bf16 on must not look like zeros.
        target[i] = np.uint16(np.uint32(single + np.uint32(0x8000)) >> np.uint32(16))
    return carried < np.uint64(1 << 63) and _normal_or_zero(target, n)


@loop()
def _normal_or_zero(patterns, n):
    """Return whether all patterns of bf16 are of normal numbers or zeros."""
    largest, least = np.uint16(0), np.uint16(0xFFFF)
    for i in range(n):
        size = np.uint16(patterns[i] & np.uint16(0x7FFF))
        largest = max(largest, size)
        least = min(least, np.uint16(size - np.uint16(1)))  # a zero counts as the largest
    return largest < np.uint16(0x7F80) and least >= np.uint16(0x7F)


@njit(inline="always")
def quotient(value, divisor, reciprocal):
    """Return the quotient, where `divides_fast` holds; see `divide`."""
    first = value * reciprocal
    close = multiply_add(multiply_add(-first, divisor, value), reciprocal, first)
    exact = multiply_add(multiply_add(-close, divisor, value), reciprocal, close)
    return exact if abs(first) < np.inf else first


@loop(error_model="numpy")
def divide(values, n, divisor, fast):
    """Divide fp64 values by a number; a division takes as long as all of the rest of a weighted sum.

    With `fast` (see `divides_fast`) the quotient is that of Markstein 1990 ("Computation of elementary functions on the
    IBM RISC System/6000 processor"): from an approximation within one unit of the last place, the remainder, which is
    exact, times the correctly rounded reciprocal corrects it to the correctly rounded quotient. The first step brings
    the product with the reciprocal that close. Infinities and NaN are the product's. No value may be -0.0.
    """
    if not fast:
        for i in range(n):
            values[i] /= divisor
        return
    reciprocal = 1.0 / divisor
    for i in range(n):
        values[i] = quotient(values[i], divisor, reciprocal)


@loop()
def divides_fast(factors, divisor):
    """Return whether `divide` may divide sums of fp32 numbers times `factors` fast: no step may underflow or overflow.

    fp32 numbers are multiples of 2**-149. So their products with factors from 2**-100 on, which are multiples of
    2**-152, and the rounded sums of those are multiples of 2**-301: they, and the remainders, are far from
    fp64's least numbers.
    """
    serves = has_multiply_add() and 2.0**-100 <= abs(divisor) <= 2.0**100
    for factor in factors:
        serves = serves and (factor == 0.0 or 2.0**-100 <= abs(factor) <= 2.0**100)
    return serves


@loop()
def round_out(values, n, out, first):
    """Round fp64 values once, to nearest even, into the output; return the number of non-finite results.

    A NaN becomes the canonical quiet NaN, so that its bits do not depend on the device.

    ======  ==============  ============================================
    values  float64 (>=n,)  the values
    n       int64           number of elements
    out     Operand         the output
    first   int64           elements of the output before the first one
    ======  ==============  ============================================
    """
    half, full, offset, code = out
    return round_at(values, n, half, full, offset + first * width_of(code), code)


@loop()
def round_at(values, n, half, full, offset, code):
    """Do what `round_out` does from a byte of the buffer on, given as words of 16 and of 32 bits."""
    bad = 0
    if code == BF16:
        target = half[offset >> 1 : (offset >> 1) + n]
        if _round_to_bf16(values, n, target):
            return 0
        for i in range(n):
            bits = _sticky_f32_bits(values[i])
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            rounded = np.uint32(0x7FC0) if nan else rounded
            bad += (rounded & np.uint32(0x7F80)) == np.uint32(0x7F80)
            target[i] = np.uint16(rounded)
    elif code == F32:
        words32 = full[offset >> 2 : (offset >> 2) + n]
        for i in range(n):
            bits = bits_from_f32(np.float32(values[i]))
            nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            bits = np.uint32(0x7FC00000) if nan else bits
            bad += (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
            words32[i] = bits
    else:
        target = half[offset >> 1 : (offset >> 1) + n]
        for i in range(n):
            bits = _sticky_f32_bits(values[i])
            sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
            a = bits & np.uint32(0x7FFFFFFF)
            odd = (a >> np.uint32(13)) & np.uint32(1)
            normal = (a - np.uint32(112 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13)
            # 0.5 has an ulp of 2**-24, the spacing of fp16 subnormals, so the addition rounds to that spacing.
            small = bits_from_f32(f32_from_bits(a) + np.float32(0.5)) - np.uint32(0x3F000000)
            rounded = small if a < np.uint32(0x38800000) else normal
            rounded = np.uint32(0x7C00) if a >= np.uint32(0x47800000) else rounded
            rounded = np.uint32(0x7E00) if a > np.uint32(0x7F800000) else rounded | sign
            bad += (rounded & np.uint32(0x7C00)) == np.uint32(0x7C00)
            target[i] = np.uint16(rounded)
    return bad


@njit(inline="always")
def _two_rounds(c0, c1, c2, c3, k0, k1):
    # The upper halves of the counters are masked only where they are multiplied: there the mask is free, since
    # the vector instruction reads only the lower halves.
    mask = np.uint64(0xFFFFFFFF)
    p0, p1 = np.uint64(0xD2511F53) * (c0 & mask), np.uint64(0xCD9E8D57) * (c2 & mask)
    c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0
    k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    p0, p1 = np.uint64(0xD2511F53) * (c0 & mask), np.uint64(0xCD9E8D57) * (c2 & mask)
    c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0
    k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    return c0, c1, c2, c3, k0, k1


@njit(inline="always")
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al., SC'11): four 32-bit words, as uint64, of a counter and a key.

    The rounds are unrolled: a loop over them would prevent the vectorisation of the loop over elements, at three
    times the cost.
    """
    c0, c1, c2, c3, k0, k1 = _two_rounds(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _two_rounds(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _two_rounds(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _two_rounds(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _two_rounds(c0, c1, c2, c3, k0, k1)
    mask = np.uint64(0xFFFFFFFF)
    return c0 & mask, c1 & mask, c2 & mask, c3 & mask


@loop()
def words_at(element, places, count, key, out):
    """Fill `out` with the words of the elements ``element + places[:count]``.

    `places` and `out` need room for `count` rounded up to a multiple of 8, since the loop runs over whole vectors.

    =======  ===================  ============================================
    element  int64                flat index that places are relative to
    places   int64 (count + 7,)   places; entries after `count` are overwritten
    count    int64                number of words
    key      uint32 (4,)          Philox key
    out      uint32 (count + 7,)  written
    =======  ===================  ============================================
    """
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    c2, c3 = np.uint64(key[2]), np.uint64(key[3])
    padded = (count + 7) & ~7
    places[count:padded] = 0
    for t in range(padded):
        at = np.uint64(element + places[t])
        group = at >> np.uint64(2)
        w0, w1, w2, w3 = philox(group & np.uint64(0xFFFFFFFF), group >> np.uint64(32), c2, c3, k0, k1)
        low = w1 if at & np.uint64(1) else w0
        high = w3 if at & np.uint64(1) else w2
        out[t] = np.uint32(high if at & np.uint64(2) else low)


@loop()
def words(element, n, key, out):
    """Fill `out` with the words of `n` elements, from the start of the group of four that contains `element`.

    Returns the index of `element` itself in `out` (0 to 3).

    =======  ===============  ============================================
    element  int64            flat index of the first element
    n        int64            number of elements
    key      uint32 (4,)      Philox key
    out      uint32 (n + 7,)  written
    =======  ===============  ============================================
    """
    shift = element & 3
    first = np.uint64(element) >> np.uint64(2)
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    c2, c3 = np.uint64(key[2]), np.uint64(key[3])
    for g in range((shift + n + 3) >> 2):
        group = first + np.uint64(g)
        w0, w1, w2, w3 = philox(group & np.uint64(0xFFFFFFFF), group >> np.uint64(32), c2, c3, k0, k1)
        out[4 * g] = np.uint32(w0)
        out[4 * g + 1] = np.uint32(w1)
        out[4 * g + 2] = np.uint32(w2)
        out[4 * g + 3] = np.uint32(w3)
    return shift
