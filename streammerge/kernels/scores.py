"""Scores of elements as bit patterns, and merges of selected elements; both work on the tiles of `deltas.survivors`."""

import numpy as np

from streammerge.kernels import loop, njit
from streammerge.kernels.blocks import BLOCK, bits_from_f32
from streammerge.kernels.deltas import LARGEST, MAGNITUDE
from streammerge.kernels.elementary import exp, log
from streammerge.numerics.finite import SMOOTHING, UNKNOWN

_MOST = np.float64(LARGEST)


@njit(inline="always")
def pattern(score):
    """Return the bit pattern of a score rounded to fp32 (sign bit cleared); a non-finite score ranks above all others."""
    single = np.float32(score if score <= _MOST else _MOST)
    return np.uint32(bits_from_f32(single) & MAGNITUDE) if abs(score) < np.inf else np.uint32(UNKNOWN)


@njit(nogil=True)
def spread_patterns(deltas, rescales, patterns):
    """Write the fp32 pattern of the variance over the models of each element.

    ========  ==============  ============================================
    deltas    float32 (k, n)  the surviving task vectors of a tile
    rescales  float64 (k,)    their factors
    patterns  uint32 (n,)     written
    ========  ==============  ============================================
    """
    _spread_patterns(deltas, rescales, patterns, np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64))


@loop(error_model="numpy")
def _spread_patterns(deltas, rescales, patterns, means, totals):
    k = len(deltas)
    for start in range(0, len(patterns), BLOCK):
        m = min(BLOCK, len(patterns) - start)
        means[:] = 0.0
        totals[:] = 0.0
        for model in range(k):
            rescale, entries = rescales[model], deltas[model, start : start + m]
            for i in range(m):
                means[i] += rescale * np.float64(entries[i])
        for i in range(m):
            means[i] /= k
        for model in range(k):
            rescale, entries = rescales[model], deltas[model, start : start + m]
            for i in range(m):
                apart = rescale * np.float64(entries[i]) - means[i]
                totals[i] += apart * apart
        here = patterns[start : start + m]
        for i in range(m):
            here[i] = pattern(totals[i] / k)


@loop()
def importance_patterns(deltas, divergences, first, length, patterns):
    """Write the fp32 pattern of abs(entry) times its row's divergence.

    ===========  ===============  ============================================
    deltas       float32 (1, n)   the surviving task vector of a tile
    divergences  float64 (rows,)  those of all rows of the block
    first        int64            elements of the block before the tile
    length       int64            elements of a row
    patterns     uint32 (n,)      written
    ===========  ===============  ============================================
    """
    i = 0
    while i < len(patterns):  # row by row
        row = (first + i) // length
        stop = min(len(patterns), (row + 1) * length - first)
        divergence, entries, here = divergences[row], deltas[0, i:stop], patterns[i:stop]
        for j in range(len(here)):
            here[j] = pattern(abs(np.float64(entries[j])) * divergence)
        i = stop


@loop()
def _lane_sum(values, lanes):
    """Return the sum of values: eight sequential lanes, then pairwise."""
    lanes[:] = 0.0
    whole = len(values) & ~7
    for i in range(0, whole, 8):
        for j in range(8):
            lanes[j] += values[i + j]
    for i in range(whole, len(values)):
        lanes[i - whole] += values[i]
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]))


@loop(error_model="numpy")
def _probabilities(x, there, lanes):
    """Replace a row by its smoothed softmax over the elements where `there` is True."""
    top = -np.inf
    for i in range(len(x)):
        top = max(top, x[i] if there[i] else -np.inf)
    top = top if top > -np.inf else 0.0
    for i in range(len(x)):
        power = exp(x[i] - top)
        x[i] = power if there[i] else 0.0
    total = _lane_sum(x, lanes)
    total = total if total != 0.0 else 1.0
    for i in range(len(x)):
        x[i] = x[i] / total + SMOOTHING


@njit(nogil=True)
def divergences(x, y, out):
    """Write KL(x || y) of the softmaxes of each row.

    ====  ======================  ============================================
    x, y  float64 (rows, length)  overwritten
    out   float64 (rows,)         written
    ====  ======================  ============================================
    """
    _divergences(x, y, out, np.empty(x.shape[1], np.bool_), np.empty(8, np.float64))


@loop(error_model="numpy")
def _divergences(x, y, out, there, lanes):
    for row in range(len(out)):
        p, q = x[row], y[row]
        for i in range(len(p)):
            there[i] = abs(p[i]) < np.inf and abs(q[i]) < np.inf
        _probabilities(p, there, lanes)
        _probabilities(q, there, lanes)
        for i in range(len(p)):
            term = p[i] * log(p[i] / q[i])
            p[i] = term if there[i] else 0.0
        divergence = _lane_sum(p, lanes)
        out[row] = divergence if divergence > 0.0 else 0.0


@loop()
def count_patterns(patterns, window, bins):
    """Count the patterns above a window, and those inside it in ``bins[(pattern - low) >> shift]``.

    Returns ``(above, highest)``.

    ========  ============  ============================================
    patterns  uint32 (n,)   the patterns of a tile
    window    Window        the patterns to count
    bins      int32 (>=1,)  counts, added to
    ========  ============  ============================================
    """
    above, highest = 0, np.uint32(0)
    lo, hi, s = np.uint32(window.low), np.uint32(window.high), np.uint32(window.shift)
    for pattern in patterns:
        highest = max(highest, pattern)
        above += pattern > hi
        if lo <= pattern <= hi:
            bins[np.uint32(pattern - lo) >> s] += 1
    return above, highest


@njit(nogil=True)
def square_sums(deltas, rescales, selected, sums):
    """Write the sum of squares of each task vector over the selected elements of every 4096.

    Non-finite values count as 0.

    ========  ========================  ============================================
    deltas    float32 (k, n)            the surviving task vectors of a tile
    rescales  float64 (k,)              their factors
    selected  bool (n,)                 the selected elements
    sums      float64 (n / 4096 up, k)  written
    ========  ========================  ============================================
    """
    _square_sums(deltas, rescales, selected, sums, np.empty(4096, np.float64), np.empty(8, np.float64))


@loop()
def _square_sums(deltas, rescales, selected, sums, squares, lanes):
    n = deltas.shape[1]
    for block in range(len(sums)):
        start = block * 4096
        m = min(4096, n - start)
        chosen = selected[start : start + m]
        for model in range(len(deltas)):
            rescale, entries = rescales[model], deltas[model, start : start + m]
            for i in range(m):
                tau = rescale * np.float64(entries[i])
                squares[i] = tau * tau if chosen[i] and abs(entries[i]) <= LARGEST else 0.0
            sums[block, model] = _lane_sum(squares[:m], lanes)


@loop()
def _add_signed(entries, rescale, weight, chosen, sums):
    """Add the chosen entries of one task vector to the sums of their sign; a NaN counts as positive, so that it shows."""
    up, down, up_sum, down_sum, up_weight, down_weight = sums
    for i in range(len(entries)):
        tau = rescale * np.float64(entries[i])
        tau = tau if chosen[i] else 0.0
        negative = tau < 0.0
        positive = 0.0 if negative else tau
        magnitude = -tau if negative else 0.0
        up[i] += positive
        down[i] += magnitude
        up_sum[i] += weight * positive
        down_sum[i] += weight * magnitude
        up_weight[i] += weight if tau > 0.0 else 0.0
        down_weight[i] += weight if negative else 0.0


@njit(nogil=True)
def selected_merge(base, deltas, rescales, weights, zero_sign, floor, selected, out):
    """Write base + the weighted mean of the selected entries that have the sign of their sum.

    =========  ==============  ============================================
    base       float32 (n,)    the base
    deltas     float32 (k, n)  the surviving task vectors of a tile
    rescales   float64 (k,)    their factors
    weights    float64 (k,)    the weights of the mean
    zero_sign  int64           the sign elected where entries cancel: 0 for none, or 1
    floor      float64         smallest divisor of the mean
    selected   bool (n,)       the selected elements
    out        float64 (n,)    written
    =========  ==============  ============================================
    """
    sums = (
        np.empty(BLOCK, np.float64),
        np.empty(BLOCK, np.float64),
        np.empty(BLOCK, np.float64),
        np.empty(BLOCK, np.float64),
        np.empty(BLOCK, np.float64),
        np.empty(BLOCK, np.float64),
    )
    _selected_merge(base, deltas, rescales, weights, zero_sign, floor, selected, out, sums)


@loop(error_model="numpy")
def _selected_merge(base, deltas, rescales, weights, zero_sign, floor, selected, out, sums):
    up, down, up_sum, down_sum, up_weight, down_weight = sums
    for start in range(0, len(out), BLOCK):
        m = min(BLOCK, len(out) - start)
        for one in sums:
            one[:] = 0.0
        for model in range(len(deltas)):
            _add_signed(
                deltas[model, start : start + m],
                rescales[model],
                weights[model],
                selected[start : start + m],
                sums,
            )
        b, here = base[start : start + m], out[start : start + m]
        for i in range(m):
            lead = up[i] - down[i]
            merged = -down_sum[i] if lead < 0.0 else up_sum[i]
            merged = 0.0 if (lead == 0.0 and zero_sign == 0) else merged
            weight = down_weight[i] if lead < 0.0 else up_weight[i]
            weight = floor if weight < floor else weight
            here[i] = np.float64(b[i]) + merged / (weight if weight != 0.0 else 1.0)


@loop()
def _touch(entries, rescale, epsilon, touched, count):
    """Mark and count the entries above `epsilon` in magnitude; a NaN counts as above, so that the output shows it."""
    for i in range(len(entries)):
        above = not abs(rescale * np.float64(entries[i])) <= epsilon
        touched[i] = above
        count[i] += 1.0 if above else 0.0


@njit(nogil=True)
def count_touched(deltas, rescales, epsilon, alone, shared):
    """Count the elements that each model touched, alone and with others.

    ========  ==============  ============================================
    deltas    float32 (k, n)  the surviving task vectors of a tile
    rescales  float64 (k,)    their factors
    epsilon   float64         entries above it in magnitude are touched
    alone     int64 (k,)      added to
    shared    int64 (k,)      added to
    ========  ==============  ============================================
    """
    touched, count = np.empty((len(deltas), BLOCK), np.uint8), np.empty(BLOCK, np.float64)
    _count_touched(deltas, rescales, epsilon, alone, shared, touched, count)


@loop()
def _count_touched(deltas, rescales, epsilon, alone, shared, touched, count):
    k, n = deltas.shape
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        count[:] = 0.0
        for model in range(k):
            _touch(deltas[model, start : start + m], rescales[model], epsilon, touched[model], count)
        for model in range(k):
            all_touched, lone, here = 0, 0, touched[model]
            for i in range(m):
                all_touched += here[i]
                lone += here[i] & np.uint8(count[i] == 1.0)
            alone[model] += lone
            shared[model] += all_touched - lone


@njit(nogil=True)
def touched_merge(base, deltas, rescales, epsilon, factors, out):
    """Write base + the mean of the touched entries; a single touched entry is multiplied by its model's factor.

    ========  ==============  ============================================
    base      float32 (n,)    the base
    deltas    float32 (k, n)  the surviving task vectors of a tile
    rescales  float64 (k,)    their factors
    epsilon   float64         entries above it in magnitude are touched
    factors   float64 (k,)    factors of entries that a single model touched
    out       float64 (n,)    written
    ========  ==============  ============================================
    """
    touched, count = np.empty(BLOCK, np.uint8), np.empty(BLOCK, np.float64)
    total, unique = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    _touched_merge(base, deltas, rescales, epsilon, factors, out, touched, count, total, unique)


@loop(error_model="numpy")
def _touched_merge(base, deltas, rescales, epsilon, factors, out, touched, count, total, unique):
    for start in range(0, len(out), BLOCK):
        m = min(BLOCK, len(out) - start)
        count[:] = 0.0
        total[:] = 0.0
        unique[:] = 0.0
        for model in range(len(deltas)):
            entries, rescale, factor = deltas[model, start : start + m], rescales[model], factors[model]
            _touch(entries, rescale, epsilon, touched, count)
            for i in range(m):
                tau = rescale * np.float64(entries[i])
                tau = tau if touched[i] else 0.0
                total[i] += tau
                unique[i] += factor * tau
        b, here = base[start : start + m], out[start : start + m]
        for i in range(m):
            mean = total[i] / (count[i] if count[i] > 1.0 else 1.0)
            here[i] = np.float64(b[i]) + (unique[i] if count[i] == 1.0 else mean)


@njit(nogil=True)
def add_products(vectors, rescales, sums):
    """Add the products of all pairs of vectors, row after row; the pairs follow the upper triangle, row by row.

    Non-finite values count as 0.

    ========  ==========================  ============================================
    vectors   float32 (k, rows, columns)  the vectors
    rescales  float64 (k,)                their factors
    sums      float64 (pairs, columns)    added to
    ========  ==========================  ============================================
    """
    _add_products(vectors, rescales, sums, np.empty((len(vectors), vectors.shape[2]), np.float64))


@loop()
def _add_products(vectors, rescales, sums, x):
    k, rows, columns = vectors.shape
    for row in range(rows):
        for i in range(k):
            entries, tau, rescale = vectors[i, row], x[i], rescales[i]
            for column in range(columns):
                entry = entries[column]
                tau[column] = rescale * np.float64(entry) if abs(entry) <= LARGEST else 0.0
        pair = 0
        for i in range(k):
            for j in range(i, k):
                first, second, total = x[i], x[j], sums[pair]
                for column in range(columns):
                    total[column] += first[column] * second[column]
                pair += 1
