"""The fused loops of Fisher merging, and the sums of squares that normalise a diagonal."""

import numpy as np

from streammerge.kernels import njit
from streammerge.kernels.blocks import BLOCK, round_out, widen
from streammerge.kernels.deltas import delta_block, scratch


@njit(nogil=True)
def fisher_mean(
    half,
    full,
    offsets,
    codes,
    fisher_offsets,
    fisher_codes,
    base_offset,
    base_code,
    element,
    n,
    drops,
    drop_keys,
    cuts,
    cut_keys,
    rescales,
    coefficients,
    floors,
    add,
    average,
    out_offset,
    out_code,
    kept,
):
    """Write sum a_i theta_i / sum a_i, a_i = coefficient * floored F_i; see `rules.FisherMean`.

    With `rescales` the models are base + rescale * surviving delta. Returns the values that are not finite
    (a negative F counts as one) and the elements that floors decided; adds survivors to `kept`.
    """
    x, b, delta, f = (
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float32),
    )
    buffers = scratch()
    target, theta = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    low, high = np.empty((2, BLOCK), np.float64), np.empty((2, BLOCK), np.float64)
    mean = np.empty(BLOCK, np.float64)
    moved, raised, total = (
        np.empty(BLOCK, np.float64),
        np.empty(BLOCK, np.float64),
        np.empty(BLOCK, np.float64),
    )
    a = np.empty(BLOCK, np.float64)
    out_width = 4 if out_code == 2 else 2
    weight_sum = _in_order(average)
    bad = 0
    decided = 0
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        moved[:] = 0.0
        raised[:] = 0.0
        total[:] = 0.0
        mean[:] = 0.0
        if len(rescales) > 0:
            widen(half, full, base_offset + start * (4 if base_code == 2 else 2), base_code, m, b)
        for model in range(len(coefficients)):
            at = offsets[model] + start * (4 if codes[model] == 2 else 2)
            if len(rescales) > 0:
                kept[model] += delta_block(
                    half,
                    full,
                    at,
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
                for i in range(m):
                    theta[i] = np.float64(b[i]) + rescales[model] * np.float64(delta[i])
            else:
                widen(half, full, at, codes[model], m, x)
                for i in range(m):
                    theta[i] = np.float64(x[i])
            width = 4 if fisher_codes[model] == 2 else 2
            widen(half, full, fisher_offsets[model] + start * width, fisher_codes[model], m, f)
            if model == 0:
                target[:m] = theta[:m]
                low[0, :m] = theta[:m]
                high[0, :m] = theta[:m]
            now, new = model & 1, 1 - (model & 1)
            bad += _add_model(
                m,
                theta,
                target,
                f,
                coefficients[model],
                floors[model],
                add,
                low[now],
                high[now],
                low[new],
                high[new],
                moved,
                raised,
                total,
                a,
            )
            if len(average) > 0:
                for i in range(m):
                    mean[i] += average[model] * theta[i]
        last = len(coefficients) & 1
        decided += _finish(m, target, mean, weight_sum, low[last], high[last], moved, raised, total, theta, a)
        bad += round_out(a, m, half, full, out_offset + start * out_width, out_code)
    return bad, decided


@njit(nogil=True)
def _in_order(values):
    total = 0.0
    for value in values:
        total += value
    return total


# One loop per sum, and no loop that chooses between a new value and the one in place: with many arrays the
# compiler gives up on proving that they do not overlap, and such a choice becomes a conditional store; neither
# is vectorised.


@njit(nogil=True)
def _add_model(
    m, theta, target, f, coefficient, floor, add, low, high, lower, higher, moved, raised, total, a
):
    """Add one model's certainty and pull to the sums of a block; return its negative certainties.

    Writes the smallest and largest of the models so far into `lower` and `higher`.
    """
    bad = np.uint32(0)
    for i in range(m):
        bad = np.uint32(bad + np.uint32(f[i] < np.float32(0)))
    if add:
        for i in range(m):
            a[i] = np.float64(f[i]) + floor
    else:
        for i in range(m):
            known = np.float64(f[i])
            a[i] = floor if known < floor else known
    if floor != 0.0:
        for i in range(m):
            raised[i] += coefficient * (a[i] - np.float64(f[i]))
    for i in range(m):
        a[i] = coefficient * a[i]
    for i in range(m):
        moved[i] += a[i] * (theta[i] - target[i])
    for i in range(m):
        total[i] += a[i]
    for i in range(m):
        lower[i] = theta[i] if theta[i] < low[i] else low[i]
    for i in range(m):
        higher[i] = theta[i] if theta[i] > high[i] else high[i]
    return np.int64(bad)


@njit(nogil=True, error_model="numpy")  # else every division is a branch
def _finish(m, target, mean, weight_sum, low, high, moved, raised, total, theta, out):
    """Write the merged values of a block into `out`; return how many the floors decided.

    `weight_sum` is that of the average that stands where nothing is known; 0: the target does.
    """
    decided = 0
    for i in range(m):
        decided += raised[i] > 0.5 * total[i]
    for i in range(m):
        value = target[i] + moved[i] / (1.0 if total[i] == 0.0 else total[i])
        value = low[i] if value < low[i] else value
        theta[i] = high[i] if value > high[i] else value
    if weight_sum != 0.0:
        for i in range(m):
            out[i] = mean[i] / weight_sum if total[i] == 0.0 else theta[i]
    else:
        for i in range(m):
            out[i] = target[i] if total[i] == 0.0 else theta[i]
    return decided


@njit(nogil=True)
def square_sums(half, full, offset, code, n, partials):
    """Write the fp64 sum of squares of each 4096-element block into `partials`; return the bad values.

    Eight lanes per block, added pairwise, as for `deltas.abs_sums`. Bad are the negative and the not finite.
    """
    x, lanes = np.empty(BLOCK, np.float32), np.empty(8, np.float64)
    bad = 0
    for part in range((n + 4095) // 4096):
        lanes[:] = 0.0
        stop = min(n, (part + 1) * 4096)
        for start in range(part * 4096, stop, BLOCK):
            m = min(BLOCK, stop - start)
            widen(half, full, offset + start * (4 if code == 2 else 2), code, m, x)
            for i in range(m):
                bad += not (x[i] >= np.float32(0)) or x[i] == np.inf
            for i in range(m, (m + 7) & ~7):
                x[i] = np.float32(0)
            for i in range(0, m, 8):
                for j in range(8):
                    lanes[j] += np.float64(x[i + j]) * np.float64(x[i + j])
        partials[part] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + (
            (lanes[4] + lanes[5]) + (lanes[6] + lanes[7])
        )
    return bad


@njit(nogil=True)
def sums(half, full, offset, code, n):
    """Return the plain sum, the largest value and the number of zeros of a piece, for reports."""
    x = np.empty(BLOCK, np.float32)
    total, largest, zeros = 0.0, np.float32(0), 0
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        widen(half, full, offset + start * (4 if code == 2 else 2), code, m, x)
        for i in range(m):
            total += np.float64(x[i])
            largest = max(largest, x[i])
            zeros += x[i] == 0
    return total, largest, zeros
