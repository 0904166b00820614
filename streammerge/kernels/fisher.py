"""The fused loops of Fisher merging, and the sums of squares that normalise a diagonal."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streammerge.kernels import njit
from streammerge.kernels.blocks import BLOCK, round_out, widen, widen_at
from streammerge.kernels.deltas import delta_block, scratch
from streammerge.kernels.operands import Mask, width_of


class Sums(NamedTuple):
    """What `fisher_mean` adds up of a block, all fp64; (BLOCK,) where nothing else is said."""

    target: NDArray[np.float64]
    """The values of the first model."""
    low: NDArray[np.float64]
    """(2, BLOCK): the least of the models' values so far, and before"""
    high: NDArray[np.float64]
    """(2, BLOCK): the largest"""
    moved: NDArray[np.float64]
    """Sum of a_i (theta_i - target)."""
    raised: NDArray[np.float64]
    """What floors add to the sum of a_i."""
    total: NDArray[np.float64]
    """Sum of a_i."""
    mean: NDArray[np.float64]
    """Sum of theta_i by the weights of the average."""


@njit(nogil=True)
def _sums():
    return Sums(
        np.empty(BLOCK, np.float64),
        np.empty((2, BLOCK), np.float64),
        np.empty((2, BLOCK), np.float64),
        np.empty(BLOCK, np.float64),
        np.empty(BLOCK, np.float64),
        np.empty(BLOCK, np.float64),
        np.empty(BLOCK, np.float64),
    )


@njit(nogil=True)
def fisher_mean(models, fishers, base, span, terms, how, out, kept):
    """Write sum a_i theta_i / sum a_i, a_i = coefficient * floored F_i; see `rules.FisherMean`.

    With task vectors the models are base + rescale * surviving entry. Returns how many values are not finite (a
    negative F counts as one), and how many elements the floors decided.

    =======  ==========  ============================================
    models   Operands    the models, k of them
    fishers  Operands    their diagonals
    base     Operand     the base; read for task vectors only
    span     Span        the block
    terms    Terms       task vectors, or the models as they are
    how      Certainty   weights and floors
    out      Operand     the output
    kept     int64 (k,)  the survivors of each task vector are added
    =======  ==========  ============================================
    """
    x, b = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    delta, f = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    buffers, sums = scratch(), _sums()
    theta, a = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    half, full, offsets, codes = models
    fisher_offsets, fisher_codes = fishers.offsets, fishers.codes
    task_vectors, masks, rescales = terms
    drops, drop_keys, cuts, cut_keys = masks
    average, mean = how.average, sums.mean
    weight_sum = _in_order(average)
    bad = 0
    decided = 0
    for start in range(0, span.n, BLOCK):
        m = min(BLOCK, span.n - start)
        sums.moved[:] = 0.0
        sums.raised[:] = 0.0
        sums.total[:] = 0.0
        sums.mean[:] = 0.0
        if task_vectors:
            widen(base, start, m, b)
        for model in range(len(offsets)):
            at = offsets[model] + start * width_of(codes[model])
            if task_vectors:
                rescale = rescales[model]
                mask = Mask(drops[model], drop_keys[model], cuts[model], cut_keys[model])
                kept[model] += delta_block(
                    half, full, at, codes[model], b, span.element + start, m, mask, delta, buffers
                )
                for i in range(m):
                    theta[i] = np.float64(b[i]) + rescale * np.float64(delta[i])
            else:
                widen_at(half, full, at, codes[model], m, x)
                for i in range(m):
                    theta[i] = np.float64(x[i])
            fisher_at = fisher_offsets[model] + start * width_of(fisher_codes[model])
            widen_at(half, full, fisher_at, fisher_codes[model], m, f)
            if model == 0:
                sums.target[:m] = theta[:m]
                sums.low[0, :m] = theta[:m]
                sums.high[0, :m] = theta[:m]
            bad += _add_model(m, theta, f, how, model, sums, a)
            if len(average) > 0:
                for i in range(m):
                    mean[i] += average[model] * theta[i]
        decided += _finish(m, sums, len(offsets) & 1, weight_sum, theta, a)
        bad += round_out(a, m, out, start)
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
def _add_model(m, theta, f, how, model, sums, a):
    """Add one model's certainty and pull to the sums of a block; return its negative certainties.

    The least and largest values so far go from one row of `sums.low` and `sums.high` to the other.
    """
    coefficient, floor = how.coefficients[model], how.floors[model]
    target, moved, raised, total = sums.target, sums.moved, sums.raised, sums.total
    now, new = model & 1, 1 - (model & 1)
    low, high, lower, higher = sums.low[now], sums.high[now], sums.low[new], sums.high[new]
    bad = np.uint32(0)
    for i in range(m):
        bad = np.uint32(bad + np.uint32(f[i] < np.float32(0)))
    if how.add:
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
def _finish(m, sums, last, weight_sum, theta, out):
    """Write the merged values of a block into `out`; return how many the floors decided.

    `weight_sum` is that of the average that stands where nothing is known; where it is 0, the first model's value
    does. `last` is the row that holds the least and largest values. `theta` is overwritten.
    """
    target, moved, raised, total, mean = sums.target, sums.moved, sums.raised, sums.total, sums.mean
    low, high = sums.low[last], sums.high[last]
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
def square_sums(fisher, n, partials):
    """Write the fp64 sum of squares of each run of 4096 elements; return how many values are negative or not finite.

    Eight lanes per run, added pairwise, as in `deltas.abs_sums`.

    ========  =====================  ============================================
    fisher    Operand                a diagonal
    n         int64                  number of elements
    partials  float64 (n / 4096 up)  written
    ========  =====================  ============================================
    """
    x, lanes = np.empty(BLOCK, np.float32), np.empty(8, np.float64)
    bad = 0
    for part in range((n + 4095) // 4096):
        lanes[:] = 0.0
        stop = min(n, (part + 1) * 4096)
        for start in range(part * 4096, stop, BLOCK):
            m = min(BLOCK, stop - start)
            widen(fisher, start, m, x)
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
def sums(values, n):
    """Return the plain sum, the largest value and the number of zeros of a block, for reports.

    ======  =======  ============================================
    values  Operand  a diagonal
    n       int64    number of elements
    ======  =======  ============================================
    """
    x = np.empty(BLOCK, np.float32)
    total, largest, zeros = 0.0, np.float32(0), 0
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        widen(values, start, m, x)
        for i in range(m):
            total += np.float64(x[i])
            largest = max(largest, x[i])
            zeros += x[i] == 0
    return total, largest, zeros
