"""Scores of elements as bit patterns, and merges of selected elements, from task vectors that `deltas.survivors` has left."""

import numpy as np
from numba import njit

from streammerge.kernels.blocks import bits_from_f32
from streammerge.kernels.deltas import LARGEST, MAGNITUDE
from streammerge.kernels.elementary import exp, log
from streammerge.methods.scores import SMOOTHING, UNKNOWN

_MOST = np.float64(LARGEST)


@njit(inline="always")
def _pattern(score):
    """Return the bit pattern of a score rounded to fp32, sign bit off; what is not finite ranks above all others."""
    single = np.float32(score if score <= _MOST else _MOST)
    return np.uint32(bits_from_f32(single) & MAGNITUDE) if abs(score) < np.inf else np.uint32(UNKNOWN)


@njit(nogil=True, cache=True, error_model="numpy")
def spread_patterns(deltas, rescales, patterns):
    """Write the pattern of the variance over the models of each element."""
    k = len(deltas)
    for i in range(len(patterns)):
        mean = total = 0.0
        for model in range(k):
            mean += rescales[model] * np.float64(deltas[model, i])
        mean /= k
        for model in range(k):
            apart = rescales[model] * np.float64(deltas[model, i]) - mean
            total += apart * apart
        patterns[i] = _pattern(total / k)


@njit(nogil=True, cache=True)
def importance_patterns(deltas, divergences, first, length, patterns):
    """Write the pattern of abs(delta) times its row's divergence; `first` is the place of the first element."""
    for i in range(len(patterns)):
        patterns[i] = _pattern(abs(np.float64(deltas[0, i])) * divergences[(first + i) // length])


@njit(nogil=True, cache=True)
def _lane_sum(values, lanes):
    """Return the sum of values in eight lanes, each in sequence, added pairwise."""
    lanes[:] = 0.0
    whole = len(values) & ~7
    for i in range(0, whole, 8):
        for j in range(8):
            lanes[j] += values[i + j]
    for i in range(whole, len(values)):
        lanes[i - whole] += values[i]
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]))


@njit(nogil=True, cache=True, error_model="numpy")
def _probabilities(x, there, lanes):
    """Turn a row into its smoothed softmax, over the elements that are there."""
    top = -np.inf
    for i in range(len(x)):
        top = max(top, x[i] if there[i] else -np.inf)
    top = top if top > -np.inf else 0.0
    for i in range(len(x)):
        x[i] = exp(x[i] - top) if there[i] else 0.0
    total = _lane_sum(x, lanes)
    total = total if total != 0.0 else 1.0
    for i in range(len(x)):
        x[i] = x[i] / total + SMOOTHING


@njit(nogil=True, cache=True, error_model="numpy")
def divergences(x, y, out):
    """Write KL(x || y) of the softmaxes of each row; both, (rows, length) in fp64, are overwritten."""
    there, lanes = np.empty(x.shape[1], np.bool_), np.empty(8, np.float64)
    for row in range(len(out)):
        p, q = x[row], y[row]
        for i in range(len(p)):
            there[i] = abs(p[i]) < np.inf and abs(q[i]) < np.inf
        _probabilities(p, there, lanes)
        _probabilities(q, there, lanes)
        for i in range(len(p)):
            p[i] = p[i] * log(p[i] / q[i]) if there[i] else 0.0
        divergence = _lane_sum(p, lanes)
        out[row] = divergence if divergence > 0.0 else 0.0


@njit(nogil=True, cache=True)
def count_patterns(patterns, low, high, shift, bins):
    """Count the patterns above `high`, and in the window by ``bins[(pattern - low) >> shift]``.

    Returns ``(above, highest)``.
    """
    above, highest = 0, np.uint32(0)
    lo, hi, s = np.uint32(low), np.uint32(high), np.uint32(shift)
    for pattern in patterns:
        highest = max(highest, pattern)
        above += pattern > hi
        if lo <= pattern <= hi:
            bins[np.uint32(pattern - lo) >> s] += 1
    return above, highest


@njit(nogil=True, cache=True)
def square_sums(deltas, rescales, selected, sums):
    """Write the sum of squares of each task vector over the selected elements of every 4096, (blocks, models).

    `selected` has a byte for each element. What is not finite has no part.
    """
    squares, lanes = np.empty(4096, np.float64), np.empty(8, np.float64)
    n = deltas.shape[1]
    for block in range(len(sums)):
        start = block * 4096
        m = min(4096, n - start)
        for model in range(len(deltas)):
            for i in range(m):
                delta = deltas[model, start + i]
                tau = rescales[model] * np.float64(delta) if abs(delta) <= LARGEST else 0.0
                squares[i] = tau * tau if selected[start + i] else 0.0
            sums[block, model] = _lane_sum(squares[:m], lanes)


@njit(nogil=True, cache=True, error_model="numpy")
def selected_merge(base, deltas, rescales, weights, zero_sign, floor, selected, out):
    """Write base + the weighted mean of the selected entries that have the sign of their sum, in fp64."""
    for i in range(len(out)):
        up = down = up_sum = down_sum = up_weight = down_weight = 0.0
        if selected[i]:
            for model in range(len(deltas)):
                tau, weight = rescales[model] * np.float64(deltas[model, i]), weights[model]
                if tau < 0.0:
                    down -= tau
                    down_sum -= weight * tau
                    down_weight += weight
                else:  # a NaN goes here, where it is found
                    up += tau
                    up_sum += weight * tau
                    up_weight += weight if tau > 0.0 else 0.0
        lead = up - down
        merged = -down_sum if lead < 0.0 else up_sum
        merged = 0.0 if (lead == 0.0 and zero_sign == 0) else merged
        weight = down_weight if lead < 0.0 else up_weight
        weight = floor if weight < floor else weight
        out[i] = np.float64(base[i]) + merged / (weight if weight != 0.0 else 1.0)


@njit(nogil=True, cache=True)
def count_touched(deltas, rescales, epsilon, alone, shared):
    """Add how many elements each model has touched, alone and with others: entries above `epsilon` in magnitude."""
    k = len(deltas)
    touched = np.empty(k, np.bool_)
    for i in range(deltas.shape[1]):
        count = 0
        for model in range(k):
            touched[model] = not abs(rescales[model] * np.float64(deltas[model, i])) <= epsilon
            count += touched[model]
        for model in range(k):
            alone[model] += touched[model] and count == 1
            shared[model] += touched[model] and count > 1


@njit(nogil=True, cache=True, error_model="numpy")
def touched_merge(base, deltas, rescales, epsilon, factors, out):
    """Write base + the mean of the entries above `epsilon` in magnitude, or the lone one times its model's factor."""
    for i in range(len(out)):
        total = unique = 0.0
        count = 0
        for model in range(len(deltas)):
            tau = rescales[model] * np.float64(deltas[model, i])
            if not abs(tau) <= epsilon:  # a NaN is above, where it is found
                total += tau
                unique += factors[model] * tau
                count += 1
        merged = unique if count == 1 else total / np.float64(max(count, 1))
        out[i] = np.float64(base[i]) + merged


@njit(nogil=True, cache=True)
def add_products(vectors, rescales, sums):
    """Add the products of all pairs of vectors, (vectors, rows, columns), to `sums`, (pairs, columns), row after row.

    What is not finite has no part.
    """
    k, rows, columns = vectors.shape
    x = np.empty((k, columns), np.float64)
    for row in range(rows):
        for i in range(k):
            for column in range(columns):
                entry = vectors[i, row, column]
                x[i, column] = rescales[i] * np.float64(entry) if abs(entry) <= LARGEST else 0.0
        pair = 0
        for i in range(k):
            for j in range(i, k):
                for column in range(columns):
                    sums[pair, column] += x[i, column] * x[j, column]
                pair += 1
