"""The fused apply loops: a weighted sum of models, and a merge of masked task vectors."""

import numpy as np

from streammerge.kernels import njit
from streammerge.kernels.blocks import BLOCK, round_out, widen, widen_at
from streammerge.kernels.deltas import delta_block, scratch
from streammerge.kernels.operands import Mask, width_of


@njit(nogil=True, error_model="numpy")
def weighted_sum(models, weights, divisor, n, out):
    """Write sum_i w_i x_i / divisor, summed in fp64 in model order; return how many results are not finite.

    =======  ============  ============================================
    models   Operands      the terms, k of them
    weights  float64 (k,)  their weights
    divisor  float64       1.0 where the sum is not divided
    n        int64         number of elements
    out      Operand       the output
    =======  ============  ============================================
    """
    half, full, offsets, codes = models
    x, total = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float64)
    bad = 0
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        total[:] = 0.0
        for i in range(len(weights)):
            widen_at(half, full, offsets[i] + start * width_of(codes[i]), codes[i], m, x)
            weight = weights[i]
            for at in range(m):
                total[at] += weight * np.float64(x[at])
        if divisor != 1.0:
            for at in range(m):
                total[at] /= divisor
        bad += round_out(total, m, out, start)
    return bad


@njit(nogil=True, error_model="numpy")
def _elect(m, positive, negative, positive_weight, negative_weight, zero_sign, normalize, merged):
    """Disjoint merge of the elected sign, the one of larger total magnitude; return the sign total."""
    ups, downs = np.int64(0), np.int64(0)
    for i in range(m):
        lead = positive[i] - negative[i]
        down = lead < 0.0 or (lead == 0.0 and zero_sign < 0)  # a NaN goes up, where it stays one
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
    """Add a task vector to the totals of its signs; a NaN goes to the positive ones, where it is found."""
    for i in range(m):
        tau = coefficient * np.float64(delta[i])
        down = tau < 0.0
        positive[i] += 0.0 if down else tau
        negative[i] -= tau if down else 0.0


@njit(nogil=True)
def _count_signs(m, delta, sign, ups, downs):
    """Count the models of each sign, in lanes of the deltas' width."""
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
    """Return whether counting signs serves for adding weights.

    It does if all weights are the same, k times it is what adding it k times gives, and no coefficient is so
    small that a task vector's entry may vanish under it.
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
def task_vector_merge(models, base, span, masks, how, out, tally):
    """Write base + scale * merged task vectors; return how many results are not finite.

    With `how.elect`, entries of the elected sign are summed (and divided by their weights when `how.normalize`);
    without, all are summed and divided by `how.divisor`. An output of code `NOTHING` is not written: only the counts
    are wanted.

    ======  ===========  ============================================
    models  Operands     the models, k of them
    base    Operand      the base
    span    Span         the block
    masks   Masks        the drops and the cuts
    how     Combination  weights, signs, scale
    out     Operand      the output
    tally   Tally        survivors and elected signs, added to
    ======  ===========  ============================================
    """
    b, delta, buffers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), scratch()
    positive, negative = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    positive_weight, negative_weight = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    ups, downs = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    merged = np.empty(BLOCK, np.float64)
    half, full, offsets, codes = models
    drops, drop_keys, cuts, cut_keys = masks
    kept, signs = tally
    coefficients, weights, elect, normalize = how.coefficients, how.weights, how.elect, how.normalize
    divisor, scale = how.divisor, how.scale
    counted = normalize and _counts_serve(weights, coefficients)
    bad = 0
    for start in range(0, span.n, BLOCK):
        m = min(BLOCK, span.n - start)
        widen(base, start, m, b)
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
            mask = Mask(drops[i], drop_keys[i], cuts[i], cut_keys[i])
            kept[i] += delta_block(half, full, at, codes[i], b, span.element + start, m, mask, delta, buffers)
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
                m, positive, negative, positive_weight, negative_weight, how.zero_sign, normalize, merged
            )
        elif divisor != 1.0:
            for at in range(m):
                merged[at] = positive[at] / divisor
        if out.code >= 0:
            source = merged if elect or divisor != 1.0 else positive
            for at in range(m):
                positive[at] = np.float64(b[at]) + scale * source[at]
            bad += round_out(positive, m, out, start)
    return bad
