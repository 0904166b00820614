"""The fused apply loops: a weighted sum of models, and a merge of masked task vectors."""

import numpy as np

from streammerge.kernels import njit
from streammerge.kernels.blocks import BLOCK, f32_from_bits, round_at, widen_at
from streammerge.kernels.deltas import delta_block, scratch
from streammerge.kernels.operands import BF16, width_of


@njit(nogil=True)
def _add_two(first, second, weight, other_weight, total):
    """Add two terms, given as patterns of bf16, one after the other."""
    for at in range(len(first)):
        x = np.float64(f32_from_bits(np.uint32(first[at]) << np.uint32(16)))
        y = np.float64(f32_from_bits(np.uint32(second[at]) << np.uint32(16)))
        total[at] = (total[at] + weight * x) + other_weight * y


@njit(nogil=True, error_model="numpy")
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
    half, full, offsets, codes = models
    out_half, out_full, out_offset, out_code = out
    out_width = width_of(out_code)
    x, total = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float64)
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
            for at in range(m):
                total[at] /= divisor
        bad += round_at(total, m, out_half, out_full, out_offset + start * out_width, out_code)
    return bad


@njit(nogil=True, error_model="numpy")
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


@njit(nogil=True)
def _sum_signs(m, delta, coefficient, positive, negative):
    """Add a task vector to the totals of its signs; a NaN counts as positive, so that the output shows it."""
    for i in range(m):
        tau = coefficient * np.float64(delta[i])
        down = tau < 0.0
        positive[i] += 0.0 if down else tau
        negative[i] -= tau if down else 0.0


@njit(nogil=True)
def _count_signs(m, delta, sign, ups, downs):
    """Count the models of each sign, in lanes as wide as the deltas."""
    for i in range(m):
        signed = sign * delta[i]
        ups[i] += np.float32(1) if signed > np.float32(0) else np.float32(0)
        downs[i] += np.float32(1) if signed < np.float32(0) else np.float32(0)


@njit(nogil=True)
def _add_weights(m, delta, coefficient, weight, positive_weight, negative_weight):
    for i in range(m):
        tau = coefficient * np.float64(delta[i])
        positive_weight[i] += weight if tau > 0.0 else 0.0
        negative_weight[i] += weight if tau < 0.0 else 0.0


@njit(nogil=True)
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


@njit(nogil=True, error_model="numpy")
def task_vector_merge(models, base, span, masks, how, out, tally, others):
    """Write base + scale * merged task vectors; return the number of non-finite results.

    With `how.elect`, entries of the elected sign are summed (and divided by their weights if `how.normalize`);
    otherwise all entries are summed and divided by `how.divisor`. An output of code `NOTHING` is not written; only the
    counts are used.

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
    b, delta, buffers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), scratch()
    positive, negative = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    positive_weight, negative_weight = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    ups, downs = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    merged = np.empty(BLOCK, np.float64)
    half, full, offsets, codes = models
    base_half, base_full, base_offset, base_code = base
    out_half, out_full, out_offset, out_code = out
    base_width, out_width = width_of(base_code), width_of(out_code)
    element, n = span
    drops, drop_keys, cuts, cut_keys = masks
    kept, signs = tally
    coefficients, weights, elect, zero_sign, normalize, divisor, scale = how
    scales, other_offsets, other_bad = others
    counted = normalize and _counts_serve(weights, coefficients)
    bad = 0
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        widen_at(base_half, base_full, base_offset + start * base_width, base_code, m, b)
        positive[:] = 0.0
        if elect:
            negative[:] = 0.0
            if counted:
                ups[:] = np.float32(0)
                downs[:] = np.float32(0)
            else:
                positive_weight[:] = 0.0
                negative_weight[:] = 0.0
        for i in range(len(weights)):
            at = offsets[i] + start * width_of(codes[i])
            drop, drop_key, cut, cut_key = drops[i], drop_keys[i], cuts[i], cut_keys[i]
            kept[i] += delta_block(
                half, full, at, codes[i], b, element + start, m, drop, drop_key, cut, cut_key, delta, buffers
            )
            coefficient = coefficients[i]
            if elect:
                _sum_signs(m, delta, coefficient, positive, negative)
                if counted:
                    _count_signs(m, delta, np.float32(np.sign(coefficient)), ups, downs)
                elif normalize:
                    _add_weights(m, delta, coefficient, weights[i], positive_weight, negative_weight)
            else:
                for at in range(m):
                    positive[at] += coefficient * np.float64(delta[at])
        if elect:
            if counted:
                for at in range(m):
                    positive_weight[at] = weights[0] * np.float64(ups[at])
                    negative_weight[at] = weights[0] * np.float64(downs[at])
            signs[0] += _elect(
                m, positive, negative, positive_weight, negative_weight, zero_sign, normalize, merged
            )
        elif divisor != 1.0:
            for at in range(m):
                merged[at] = positive[at] / divisor
        if out_code >= 0:
            source = merged if elect or divisor != 1.0 else positive
            for k in range(len(scales)):
                for at in range(m):
                    negative[at] = np.float64(b[at]) + scales[k] * source[at]
                place = other_offsets[k] + start * out_width
                other_bad[k] += round_at(negative, m, out_half, out_full, place, out_code)
            for at in range(m):
                positive[at] = np.float64(b[at]) + scale * source[at]
            bad += round_at(positive, m, out_half, out_full, out_offset + start * out_width, out_code)
    return bad
