"""The fused apply loops: a weighted sum of models, and a merge of masked task vectors."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streammerge.kernels import loop, njit
from streammerge.kernels.blocks import BLOCK, divide, divides_fast, f32_from_bits, round_at, widen_at
from streammerge.kernels.deltas import delta_block, scratch
from streammerge.kernels.operands import BF16
from streammerge.kernels.widths import width_of
from streammerge.numerics.bits import bits_from_f64, f64_from_bits


@loop()
def _add_two(first, second, weight, other_weight, total):
    """Add two terms, given as patterns of bf16, one after the other."""
    for at in range(len(first)):
        x = np.float64(f32_from_bits(np.uint32(first[at]) << np.uint32(16)))
        y = np.float64(f32_from_bits(np.uint32(second[at]) << np.uint32(16)))
        total[at] = (total[at] + weight * x) + other_weight * y


@njit(nogil=True)
def weighted_sum(models, weights, divisor, n, out):
    """Write sum_i w_i x_i / divisor, summed in fp64 in model order; return the number of non-finite results.

    =======  ============  ============================================
    models   Operands      the terms, k of them
    weights  float64 (k,)  their weights
    divisor  float64       1.0 if the sum is not divided
    n        int64         number of elements
    out      Operand       the output
    =======  ============  ============================================
    """
    return _weigh(models, weights, divisor, n, out, np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float64))


@loop()
def _weigh(models, weights, divisor, n, out, x, total):
    half, full, offsets, codes = models
    out_half, out_full, out_offset, out_code = out
    out_width = width_of(out_code)
    fast = divides_fast(weights, divisor)
    bad = 0
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        total[:] = 0.0
        i = 0
        while i < len(weights):
            if i + 1 < len(weights) and codes[i] == BF16 and codes[i + 1] == BF16:  # two thirds of the time
                first, second = (offsets[i] >> 1) + start, (offsets[i + 1] >> 1) + start
                _add_two(
                    half[first : first + m], half[second : second + m], weights[i], weights[i + 1], total
                )
                i += 2
                continue
            widen_at(half, full, offsets[i] + start * width_of(codes[i]), codes[i], m, x)
            weight = weights[i]
            for at in range(m):
                total[at] += weight * np.float64(x[at])
            i += 1
        if divisor != 1.0:
            divide(total, m, divisor, fast)
        bad += round_at(total, m, out_half, out_full, out_offset + start * out_width, out_code)
    return bad


@loop(error_model="numpy")
def _elect(m, positive, negative, positive_weight, negative_weight, zero_sign, normalize, merged):
    """Merge the entries of the elected sign, which has the larger total magnitude; return the sign total."""
    ups, downs = np.int64(0), np.int64(0)
    for i in range(m):
        lead = positive[i] - negative[i]
        down = lead < 0.0 or (lead == 0.0 and zero_sign < 0)  # a NaN counts as positive, so that it stays NaN
        value = -negative[i] if down else positive[i]
        weight = negative_weight[i] if down else positive_weight[i]
        value = 0.0 if (lead == 0.0 and zero_sign == 0) else value
        divisor = weight if (normalize and weight != 0.0) else 1.0
        merged[i] = value / divisor
        ups += lead > 0.0
        downs += lead < 0.0
    return ups - downs


@loop()
def _sum_signs(m, delta, coefficient, positive, negative):
    """Add a task vector to the totals of its signs; a NaN counts as positive, so that the output shows it."""
    for i in range(m):
        tau = coefficient * np.float64(delta[i])
        down = tau < 0.0
        positive[i] += 0.0 if down else tau
        negative[i] -= tau if down else 0.0


@loop()
def _count_signs(m, delta, sign, ups, downs):
    """Count the models of each sign, in lanes as wide as the deltas."""
    for i in range(m):
        signed = sign * delta[i]
        ups[i] += np.float32(1) if signed > np.float32(0) else np.float32(0)
        downs[i] += np.float32(1) if signed < np.float32(0) else np.float32(0)


@loop()
def _add_weights(m, delta, coefficient, weight, positive_weight, negative_weight):
    for i in range(m):
        tau = coefficient * np.float64(delta[i])
        positive_weight[i] += weight if tau > 0.0 else 0.0
        negative_weight[i] += weight if tau < 0.0 else 0.0


@loop()
def _counts_serve(weights, coefficients):
    """Return whether counting signs can replace adding weights.

    It can if all weights are equal, multiplying the weight by k gives the same bits as adding it k times, and no
    coefficient is so small that an entry times it may underflow to 0.
    """
    total = 0.0
    for i in range(len(weights)):
        total += weights[i]
        if weights[i] != weights[0] or total != np.float64(i + 1) * weights[0]:
            return False
        if 0.0 < abs(coefficients[i]) < 1e-200:
            return False
    return True


@loop(error_model="numpy")
def _elect_few(m, deltas, coefficients, weights, zero_sign, merged):
    """Do what `_sum_signs` for every model and `_elect` do, in one loop without sums in memory; counts nothing.

    It is compiled for each number of models, the length of the tuples: the loops over them are unrolled, and the loop
    over elements vectorises. The operations on one element and their order are the same, so the bits are. Only the
    weights of the elected sign are added: an entry has that sign if it is above 0 after -1 has multiplied it where
    the sign is negative, and a NaN has none.

    ============  ===========================  ============================================
    m             int64                        number of elements
    deltas        float32 (models * BLOCK,)    the surviving task vectors, one behind the other
    coefficients  k floats                     the factors of their entries
    weights       k floats, or ()              weights whose sum divides; (): nothing is divided
    zero_sign     int64                        see `TaskVectorMerge`
    merged        float64 (>=m,)               written
    ============  ===========================  ============================================
    """
    for i in range(np.uint64(m)):  # unsigned: a check for negative indices would prevent the vectorisation
        positive, negative = 0.0, 0.0
        for j in range(len(coefficients)):
            tau = coefficients[j] * np.float64(deltas[i + np.uint64(j * BLOCK)])
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
                tau = coefficients[j] * np.float64(deltas[i + np.uint64(j * BLOCK)])
                weight += weights[j] if f64_from_bits(bits_from_f64(tau) ^ flip) > 0.0 else 0.0
            value = value / (weight if weight != 0.0 else 1.0)
        merged[i] = value


@loop()
def _elect_by_number(m, deltas, c, w, zero_sign, normalize, merged):
    """Call `_elect_few` for two, three or four models, with the coefficients `c` and the weights `w`."""
    if normalize:
        if len(c) == 4:
            _elect_few(m, deltas, (c[0], c[1], c[2], c[3]), (w[0], w[1], w[2], w[3]), zero_sign, merged)
        elif len(c) == 3:
            _elect_few(m, deltas, (c[0], c[1], c[2]), (w[0], w[1], w[2]), zero_sign, merged)
        else:
            _elect_few(m, deltas, (c[0], c[1]), (w[0], w[1]), zero_sign, merged)
    elif len(c) == 4:
        _elect_few(m, deltas, (c[0], c[1], c[2], c[3]), (), zero_sign, merged)
    elif len(c) == 3:
        _elect_few(m, deltas, (c[0], c[1], c[2]), (), zero_sign, merged)
    else:
        _elect_few(m, deltas, (c[0], c[1]), (), zero_sign, merged)


@loop()
def _add_scaled(m, delta, coefficient, total):
    for i in range(m):
        total[i] += coefficient * np.float64(delta[i])


@loop()
def _shift(m, base, scale, merged, out):
    """Write base + scale * merged in fp64."""
    for i in range(m):
        out[i] = np.float64(base[i]) + scale * merged[i]


class _Totals(NamedTuple):
    """Sums over the models for the elements of a block, each (BLOCK,); what is not asked for is not used."""

    positive: NDArray[np.float64]
    """The sum of all entries or, with an election, of those above 0."""
    negative: NDArray[np.float64]
    """The sum of the magnitudes of those below 0."""
    positive_weight: NDArray[np.float64]
    negative_weight: NDArray[np.float64]
    ups: NDArray[np.float32]
    """Numbers of entries above 0, in place of weights if `_counts_serve`."""
    downs: NDArray[np.float32]


@njit(nogil=True)
def _totals():
    return _Totals(
        np.empty(BLOCK, np.float64),
        np.empty(BLOCK, np.float64),
        np.empty(BLOCK, np.float64),
        np.empty(BLOCK, np.float64),
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
    )


@loop()
def _clear(totals, elect):
    totals.positive[:] = 0.0
    if elect:
        totals.negative[:] = 0.0
        totals.positive_weight[:] = 0.0
        totals.negative_weight[:] = 0.0
        totals.ups[:] = np.float32(0)
        totals.downs[:] = np.float32(0)


@loop()
def _add_vector(m, delta, coefficient, weight, elect, normalize, counted, totals):
    """Add a surviving task vector to the totals."""
    if not elect:
        _add_scaled(m, delta, coefficient, totals.positive)
        return
    _sum_signs(m, delta, coefficient, totals.positive, totals.negative)
    if normalize and counted:
        _count_signs(m, delta, np.float32(np.sign(coefficient)), totals.ups, totals.downs)
    elif normalize:
        _add_weights(m, delta, coefficient, weight, totals.positive_weight, totals.negative_weight)


@loop()
def _elect_totals(m, totals, weight, zero_sign, normalize, counted, merged):
    """Elect from the totals, whose counts are of models of the same `weight`; return the sign total."""
    if normalize and counted:
        for i in range(m):
            totals.positive_weight[i] = weight * np.float64(totals.ups[i])
        for i in range(m):
            totals.negative_weight[i] = weight * np.float64(totals.downs[i])
    return _elect(
        m,
        totals.positive,
        totals.negative,
        totals.positive_weight,
        totals.negative_weight,
        zero_sign,
        normalize,
        merged,
    )


@njit(nogil=True)
def task_vector_merge(models, base, span, masks, how, out, tally, others):
    """Write base + scale * merged task vectors; return the number of non-finite results.

    With `how.elect`, entries of the elected sign are summed (and divided by their weights if `how.normalize`);
    otherwise all entries are summed and divided by `how.divisor`. An output of code `NOTHING` is not written; only the
    counts are used. Signs are counted only then.

    ======  ===========  ============================================
    models  Operands     the models, k of them
    base    Operand      the base
    span    Span         the block
    masks   Masks        the drops and the cuts
    how     Combination  weights, signs, scale
    out     Operand      the output
    tally   Tally        survivors and elected signs, added to
    others  Others       further outputs of the same dtype, which differ only in the scale
    ======  ===========  ============================================
    """
    deltas = np.empty(4 * BLOCK, np.float32)
    b, merged, result = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    room = deltas, b, merged, result, _totals(), scratch()
    return _merge_task_vectors(models, base, span, masks, how, out, tally, others, room)


@loop()
def _merge_task_vectors(models, base, span, masks, how, out, tally, others, room):
    half, full, offsets, codes = models
    base_half, base_full, base_offset, base_code = base
    out_half, out_full, out_offset, out_code = out
    base_width, out_width = width_of(base_code), width_of(out_code)
    element, n = span
    drops, drop_keys, cuts, cut_keys = masks
    kept, signs = tally
    coefficients, weights, elect, zero_sign, normalize, divisor, scale = how
    scales, other_offsets, other_bad = others
    k = len(offsets)
    few = elect and 2 <= k <= 4 and out_code >= 0
    counted = normalize and _counts_serve(weights, coefficients)
    fast = divides_fast(coefficients, divisor)
    deltas, b, merged, result, totals, buffers = room
    merged = merged if elect else totals.positive
    bad = 0
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        widen_at(base_half, base_full, base_offset + start * base_width, base_code, m, b)
        if not few:
            _clear(totals, elect)
        for i in range(k):
            at = offsets[i] + start * width_of(codes[i])
            drop, drop_key, cut, cut_key = drops[i], drop_keys[i], cuts[i], cut_keys[i]
            delta = deltas[i * BLOCK : (i + 1) * BLOCK] if few else deltas[:BLOCK]
            kept[i] += delta_block(
                half, full, at, codes[i], b, element + start, m, drop, drop_key, cut, cut_key, delta, buffers
            )
            if not few:
                _add_vector(m, delta, coefficients[i], weights[i], elect, normalize, counted, totals)
        if few:
            _elect_by_number(m, deltas, coefficients, weights, zero_sign, normalize, merged)
        elif elect:
            signs[0] += _elect_totals(m, totals, weights[0], zero_sign, normalize, counted, merged)
        elif divisor != 1.0:
            divide(merged, m, divisor, fast)
        if out_code >= 0:
            for other in range(len(scales)):
                _shift(m, b, scales[other], merged, result)
                place = other_offsets[other] + start * out_width
                other_bad[other] += round_at(result, m, out_half, out_full, place, out_code)
            _shift(m, b, scale, merged, result)
            bad += round_at(result, m, out_half, out_full, out_offset + start * out_width, out_code)
    return bad
