"""Sums and elections of two to four models, in one loop without totals in memory.

A loop is compiled for each number of models, the length of its tuples: the loops over models are unrolled, and the loop
over elements vectorises. The operations on one element and their order are those of the loops of `merge` over any number
of models, so the bits are.
"""

import numpy as np

from streammerge.kernels import loop
from streammerge.kernels.blocks import BLOCK, divides_fast, f32_from_bits, quotient
from streammerge.kernels.operands import BF16
from streammerge.numerics.bits import bits_from_f64, f64_from_bits


@loop()
def is_few(n):
    """Return whether there are loops for this number of models."""
    return 2 <= n <= 4


@loop(error_model="numpy")
def _weigh(m, half, first, weights, divisor, total):
    for i in range(np.uint64(m)):  # unsigned: a check for negative indices would prevent the vectorisation
        value = 0.0
        for j in range(len(weights)):
            x = f32_from_bits(np.uint32(half[first[j] + i]) << np.uint32(16))
            value += weights[j] * np.float64(x)
        total[i] = quotient(value, divisor[0], divisor[1]) if len(divisor) > 0 else value


@loop()
def _weigh_by_number(m, half, f, w, divisor, total):
    if len(w) == 4:
        places = np.uint64(f[0]), np.uint64(f[1]), np.uint64(f[2]), np.uint64(f[3])
        _weigh(m, half, places, (w[0], w[1], w[2], w[3]), divisor, total)
    elif len(w) == 3:
        three = np.uint64(f[0]), np.uint64(f[1]), np.uint64(f[2])
        _weigh(m, half, three, (w[0], w[1], w[2]), divisor, total)
    else:
        _weigh(m, half, (np.uint64(f[0]), np.uint64(f[1])), (w[0], w[1]), divisor, total)


@loop(error_model="numpy")
def weigh_few(m, half, first, weights, divisor, total):
    """Write sum_i w_i x_i / divisor of bf16 numbers; `few_serve` must hold.

    =======  ==============  ============================================
    m        int64           number of elements
    half     uint16          the buffer in words of 16 bits
    first    int64 (k,)      the words at which the terms begin
    weights  float64 (k,)    their weights
    divisor  float64         1.0 if the sum is not divided
    total    float64 (>=m,)  written
    =======  ==============  ============================================
    """
    if divisor == 1.0:
        _weigh_by_number(m, half, first, weights, (), total)
    else:
        _weigh_by_number(m, half, first, weights, (divisor, 1.0 / divisor), total)


@loop()
def few_serve(codes, weights, divisor):
    """Return whether `weigh_few` serves a weighted sum."""
    serves = is_few(len(weights)) and (divisor == 1.0 or divides_fast(weights, divisor))
    for code in codes:
        serves = serves and code == BF16
    return serves


@loop(error_model="numpy")
def _add(m, deltas, coefficients, divisor, base, scale, out):
    for i in range(np.uint64(m)):
        total = 0.0
        for j in range(len(coefficients)):
            total += coefficients[j] * np.float64(deltas[i + np.uint64(j * BLOCK)])
        total = quotient(total, divisor[0], divisor[1]) if len(divisor) > 0 else total
        out[i] = np.float64(base[i]) + scale * total


@loop()
def _add_by_number(m, deltas, c, divisor, base, scale, out):
    if len(c) == 4:
        _add(m, deltas, (c[0], c[1], c[2], c[3]), divisor, base, scale, out)
    elif len(c) == 3:
        _add(m, deltas, (c[0], c[1], c[2]), divisor, base, scale, out)
    else:
        _add(m, deltas, (c[0], c[1]), divisor, base, scale, out)


@loop(error_model="numpy")
def add_few(m, deltas, coefficients, divisor, base, scale, out):
    """Write base + scale * (sum of the task vectors / divisor); `divides_fast` must hold.

    ============  =====================  ============================================
    m             int64                  number of elements
    deltas        float32 (>=k * BLOCK)  the surviving task vectors, one behind the other
    coefficients  float64 (k,)           the factors of their entries
    divisor       float64                1.0 if the sum is not divided
    base          float32 (>=m,)         the base; -0.0 leaves the sum as it is
    scale         float64                see `TaskVectorMerge`
    out           float64 (>=m,)         written
    ============  =====================  ============================================
    """
    if divisor == 1.0:
        _add_by_number(m, deltas, coefficients, (), base, scale, out)
    else:
        _add_by_number(m, deltas, coefficients, (divisor, 1.0 / divisor), base, scale, out)


@loop(error_model="numpy")
def _elect(m, deltas, stride, coefficients, weights, zero_sign, base, scale, out):
    """Do what `elect_few` does, with tuples; with () for the weights nothing is divided.

    Only the weights of the elected sign are added: an entry has that sign if it is above 0 after -1 has multiplied it where
    the sign is negative, and a NaN has none. The division costs nothing: its unit works while others do the rest.
    """
    for i in range(np.uint64(m)):
        positive, negative = 0.0, 0.0
        for j in range(len(coefficients)):
            tau = coefficients[j] * np.float64(deltas[i + np.uint64(j * stride)])
            positive += 0.0 if tau < 0.0 else tau
            negative -= tau if tau < 0.0 else 0.0
        lead = positive - negative
        down = lead < 0.0 or (lead == 0.0 and zero_sign < 0)
        value = -negative if down else positive
        value = 0.0 if (lead == 0.0 and zero_sign == 0) else value
        if len(weights) > 0:
            flip = np.uint64(1 << 63) if down else np.uint64(0)
            weight = 0.0
            for j in range(len(weights)):
                tau = coefficients[j] * np.float64(deltas[i + np.uint64(j * stride)])
                weight += weights[j] if f64_from_bits(bits_from_f64(tau) ^ flip) > 0.0 else 0.0
            value = value / (weight if weight != 0.0 else 1.0)
        out[i] = np.float64(base[i]) + scale * value


@loop()
def _elect_divided(m, deltas, stride, coefficients, weights, normalize, zero_sign, base, scale, out):
    if normalize:
        _elect(m, deltas, stride, coefficients, weights, zero_sign, base, scale, out)
    else:
        _elect(m, deltas, stride, coefficients, (), zero_sign, base, scale, out)


@loop()
def elect_few(m, deltas, stride, c, w, normalize, zero_sign, base, scale, out):
    """Write base + scale * the merged entries of the elected sign, which has the larger total magnitude.

    =========  =====================  ============================================
    m          int64                  number of elements
    deltas     float32, float64       the surviving task vectors, (>=(k - 1) * stride + m,)
    stride     int64                  elements from one of them to the next
    c          float64 (k,)           the factors of their entries
    w          float64 (k,)           their weights
    normalize  bool                   whether the weights of the elected sign divide
    zero_sign  int64                  see `TaskVectorMerge`
    base       float32 (>=m,)         the base; -0.0 leaves the merged entries as they are
    scale      float64                see `TaskVectorMerge`
    out        float64 (>=m,)         written
    =========  =====================  ============================================
    """
    if len(c) == 4:
        four = c[0], c[1], c[2], c[3]
        _elect_divided(
            m, deltas, stride, four, (w[0], w[1], w[2], w[3]), normalize, zero_sign, base, scale, out
        )
    elif len(c) == 3:
        three = c[0], c[1], c[2]
        _elect_divided(m, deltas, stride, three, (w[0], w[1], w[2]), normalize, zero_sign, base, scale, out)
    else:
        _elect_divided(m, deltas, stride, (c[0], c[1]), (w[0], w[1]), normalize, zero_sign, base, scale, out)
