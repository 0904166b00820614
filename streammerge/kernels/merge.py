"""The fused apply loops: a weighted sum of models, and a merge of masked task vectors."""

import numpy as np

from streammerge.kernels import njit
from streammerge.kernels.blocks import BLOCK, round_out, widen
from streammerge.kernels.deltas import delta_block, scratch


@njit(nogil=True, error_model="numpy")
def weighted_sum(half, full, offsets, codes, weights, divisor, n, out_offset, out_code):
    """Write sum_i w_i x_i / divisor, summed in fp64 in model order; return the non-finite count."""
    x, total = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float64)
    out_width = 4 if out_code == 2 else 2
    bad = 0
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        total[:] = 0.0
        for model in range(len(weights)):
            width = 4 if codes[model] == 2 else 2
            widen(half, full, offsets[model] + start * width, codes[model], m, x)
            weight = weights[model]
            for i in range(m):
                total[i] += weight * np.float64(x[i])
        if divisor != 1.0:
            for i in range(m):
                total[i] /= divisor
        bad += round_out(total, m, half, full, out_offset + start * out_width, out_code)
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
def task_vector_merge(
    half,
    full,
    offsets,
    codes,
    base_offset,
    base_code,
    element,
    n,
    drops,
    drop_keys,
    cuts,
    cut_keys,
    coefficients,
    weights,
    elect,
    zero_sign,
    normalize,
    divisor,
    scale,
    out_offset,
    out_code,
    kept,
    signs,
):
    """Write base + scale * merged task vectors; return the non-finite count.

    Adds the survivors of each model to `kept`, and the elected signs to ``signs[0]``. With
    `elect`, entries of the elected sign are summed (and divided by their weights when `normalize`);
    without, all are summed and divided by `divisor`. An output code of -1 writes nothing: only the
    counts are wanted.
    """
    b, delta, buffers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), scratch()
    positive, negative = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    positive_weight, negative_weight = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    ups, downs = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    merged = np.empty(BLOCK, np.float64)
    counted = normalize and _counts_serve(weights, coefficients)
    base_width, out_width = (4 if base_code == 2 else 2), (4 if out_code == 2 else 2)
    bad = 0
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        widen(half, full, base_offset + start * base_width, base_code, m, b)
        positive[:] = 0.0
        if elect:
            negative[:] = 0.0
            if counted:
                ups[:] = np.float32(0)
                downs[:] = np.float32(0)
            else:
                positive_weight[:] = 0.0
                negative_weight[:] = 0.0
        for model in range(len(weights)):
            width = 4 if codes[model] == 2 else 2
            kept[model] += delta_block(
                half,
                full,
                offsets[model] + start * width,
                codes[model],
                b,
                element + start,
                m,
                drops[model],
                drop_keys[model],
                cuts[model],
                cut_keys[model],
                delta,
                buffers,
            )
            coefficient = coefficients[model]
            if elect:
                _sum_signs(m, delta, coefficient, positive, negative)
                if counted:
                    _count_signs(m, delta, np.float32(np.sign(coefficient)), ups, downs)
                elif normalize:
                    _add_weights(m, delta, coefficient, weights[model], positive_weight, negative_weight)
            else:
                for i in range(m):
                    positive[i] += coefficient * np.float64(delta[i])
        if elect:
            if counted:
                for i in range(m):
                    positive_weight[i] = weights[0] * np.float64(ups[i])
                    negative_weight[i] = weights[0] * np.float64(downs[i])
            signs[0] += _elect(
                m, positive, negative, positive_weight, negative_weight, zero_sign, normalize, merged
            )
        elif divisor != 1.0:
            for i in range(m):
                merged[i] = positive[i] / divisor
        if out_code >= 0:
            source = merged if elect or divisor != 1.0 else positive
            for i in range(m):
                positive[i] = np.float64(b[i]) + scale * source[i]
            bad += round_out(positive, m, half, full, out_offset + start * out_width, out_code)
    return bad
