"""The fused apply loops: a weighted sum of models, and a merge of masked task vectors."""

import numpy as np
from numba import njit

from streammerge.kernels.blocks import BLOCK, round_out, widen
from streammerge.kernels.deltas import delta_block


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
def _elect(m, positive, negative, positive_weight, negative_weight, zero_sign, normalize, merged):
    """Disjoint merge of the elected sign, the one of larger total magnitude; return the sign total."""
    total = 0
    for i in range(m):
        lead = positive[i] - negative[i]
        down = lead < 0.0 or (lead == 0.0 and zero_sign < 0)  # a NaN goes up, where it stays one
        value = -negative[i] if down else positive[i]
        weight = negative_weight[i] if down else positive_weight[i]
        value = 0.0 if (lead == 0.0 and zero_sign == 0) else value
        divisor = weight if (normalize and weight != 0.0) else 1.0
        merged[i] = value / divisor
        total += np.int64(lead > 0.0) - np.int64(lead < 0.0)
    return total


@njit(nogil=True, cache=True)
def _accumulate_signs(m, delta, coefficient, weight, positive, negative,
                      positive_weight, negative_weight):  # fmt: skip
    bad = 0
    for i in range(m):
        tau = coefficient * np.float64(delta[i])
        up = tau > 0.0
        down = tau < 0.0
        positive[i] += tau if up else 0.0
        negative[i] -= tau if down else 0.0
        positive_weight[i] += weight if up else 0.0
        negative_weight[i] += weight if down else 0.0
        bad += delta[i] != delta[i]
    if bad > 0:
        # A NaN compares false everywhere above; let it through so that it is found in the output.
        for i in range(m):
            if delta[i] != delta[i]:
                positive[i] = np.nan


@njit(nogil=True, cache=True)
def task_vector_merge(half, full, offsets, codes, base_offset, base_code, element, n,
                      drops, drop_keys, cuts, cut_keys, coefficients, weights,
                      elect, zero_sign, normalize, divisor, scale,
                      out_offset, out_code, kept, signs):  # fmt: skip
    """Write base + scale * merged task vectors; return the non-finite count.

    Adds the survivors of each model to `kept`, and the elected signs to ``signs[0]``. With
    `elect`, entries of the elected sign are summed (and divided by their weights when `normalize`);
    without, all are summed and divided by `divisor`. An output code of -1 writes nothing: only the
    counts are wanted.
    """
    x, b, delta = (
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
    )
    w = np.empty(BLOCK + 8, np.uint32)
    positive, negative = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    positive_weight, negative_weight = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    merged = np.empty(BLOCK, np.float64)
    base_width, out_width = (4 if base_code == 2 else 2), (4 if out_code == 2 else 2)
    bad = 0
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        widen(half, full, base_offset + start * base_width, base_code, m, b)
        positive[:] = 0.0
        if elect:
            negative[:] = 0.0
            positive_weight[:] = 0.0
            negative_weight[:] = 0.0
        for model in range(len(weights)):
            width = 4 if codes[model] == 2 else 2
            kept[model] += delta_block(
                half, full, offsets[model] + start * width, codes[model], b, element + start, m,
                drops[model], drop_keys[model], cuts[model], cut_keys[model], delta, x, w,
            )  # fmt: skip
            coefficient = coefficients[model]
            if elect:
                _accumulate_signs(m, delta, coefficient, weights[model], positive, negative,
                                  positive_weight, negative_weight)  # fmt: skip
            else:
                for i in range(m):
                    positive[i] += coefficient * np.float64(delta[i])
        if elect:
            signs[0] += _elect(m, positive, negative, positive_weight, negative_weight,
                               zero_sign, normalize, merged)  # fmt: skip
        elif divisor != 1.0:
            for i in range(m):
                merged[i] = positive[i] / divisor
        else:
            merged[:m] = positive[:m]
        if out_code >= 0:
            for i in range(m):
                positive[i] = np.float64(b[i]) + scale * merged[i]
            bad += round_out(positive, m, half, full, out_offset + start * out_width, out_code)
    return bad
