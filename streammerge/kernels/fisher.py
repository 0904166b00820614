"""Fused loops of Fisher merging, and the sums of squares that normalise a diagonal."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streammerge.kernels import loop, njit
from streammerge.kernels.blocks import BLOCK, round_out, widen, widen_at
from streammerge.kernels.deltas import delta_block, scratch
from streammerge.kernels.widths import width_of


class Sums(NamedTuple):
    """The sums that `fisher_mean` accumulates over a block; fp64 (BLOCK,) unless stated otherwise."""

    target: NDArray[np.float64]
    """The values of the first model."""
    low: NDArray[np.float64]
    """(2, BLOCK): the smallest of the models' values so far; two rows take turns"""
    high: NDArray[np.float64]
    """(2, BLOCK): the largest, likewise"""
    moved: NDArray[np.float64]
    """Sum of a_i (theta_i - target)."""
    raised: NDArray[np.float64]
    """The floors' part of the sum of a_i."""
    total: NDArray[np.float64]
    """Sum of a_i."""
    mean: NDArray[np.float64]
    """Sum of theta_i with the weights of the fallback average."""


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

    With task vectors the models are base + rescale * surviving entry. Returns the number of non-finite values (a
    negative F counts as one), and the number of elements that the floors decided.

    =======  ==========  ============================================
    models   Operands    the models, k of them
    fishers  Operands    their Fisher diagonals
    base     Operand     the base; read for task vectors only
    span     Span        the block
    terms    Terms       task vectors, or the models themselves
    how      Certainty   weights and floors
    out      Operand     the output
    kept     int64 (k,)  survivors of each task vector, added to
    =======  ==========  ============================================
    """
    x, b = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    delta, f = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    room = x, b, delta, f, np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64), _sums(), scratch()
    return _mean(models, fishers, base, span, terms, how, out, kept, room)


@loop()
def _mean(models, fishers, base, span, terms, how, out, kept, room):
    x, b, delta, f, theta, a, sums, buffers = room
    half, full, offsets, codes = models
    fisher_offsets, fisher_codes = fishers.offsets, fishers.codes
    task_vectors, masks, rescales = terms
    drops, drop_keys, cuts, cut_keys = masks
    element, n = span
    average, mean = how.average, sums.mean
    weight_sum = _in_order(average)
    bad = 0
    decided = 0
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        sums.moved[:] = 0.0
        sums.raised[:] = 0.0
        sums.total[:] = 0.0
        sums.mean[:] = 0.0
        if task_vectors:
            widen(base, start, m, b)
        for model in range(len(offsets)):
            code = codes[model]
            at = offsets[model] + start * width_of(code)
            if task_vectors:
                rescale = rescales[model]
                drop, drop_key, cut, cut_key = drops[model], drop_keys[model], cuts[model], cut_keys[model]
                kept[model] += delta_block(
                    half, full, at, code, b, element + start, m, drop, drop_key, cut, cut_key, delta, buffers
                )
                for i in range(m):
                    theta[i] = np.float64(b[i]) + rescale * np.float64(delta[i])
            else:
                widen_at(half, full, at, code, m, x)
                for i in range(m):
                    theta[i] = np.float64(x[i])
            fisher_at = fisher_offsets[model] + start * width_of(fisher_codes[model])
            widen_at(half, full, fisher_at, fisher_codes[model], m, f)
            if model == 0:
                _begin(m, theta, sums)
            bad += _add_model(m, theta, f, how, model, sums, a)
            if len(average) > 0:
                for i in range(m):
                    mean[i] += average[model] * theta[i]
        decided += _finish(m, sums, len(offsets) & 1, weight_sum, theta, a)
        bad += round_out(a, m, out, start)
    return bad, decided


@loop()
def _begin(m, theta, sums):
    """Take the first model's values as the target, and as the smallest and largest so far."""
    target, low, high = sums.target, sums.low[0], sums.high[0]
    for i in range(m):
        target[i] = theta[i]
    for i in range(m):
        low[i] = theta[i]
    for i in range(m):
        high[i] = theta[i]


@loop()
def _in_order(values):
    total = 0.0
    for value in values:
        total += value
    return total


# One loop per sum, and no loop that chooses between a new and the present value: with many arrays the compiler
# cannot prove that they do not overlap, and such a choice becomes a conditional store. Neither vectorises.


@loop()
def _add_model(m, theta, f, how, model, sums, a):
    """Add one model's weighted difference and weight to the sums of a block; return its number of negative F.

    The smallest and largest values so far move from one row of `sums.low` and `sums.high` to the other.
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


@loop(error_model="numpy")  # else every division is a branch
def _finish(m, sums, last, weight_sum, theta, out):
    """Write the merged values of a block into `out`; return the number of elements that the floors decided.

    `weight_sum` is the sum of weights of the fallback average; if it is 0, the first model's value is the fallback.
    `last` is the row that holds the smallest and largest values. `theta` is overwritten.
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
    """Write the fp64 sum of squares of each run of 4096 elements; return the number of negative or non-finite values.

    The order of the sum is that of `magnitudes.abs_sums`.

    ========  =====================  ============================================
    fisher    Operand                a Fisher diagonal
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
    """Return the sum, the largest value and the number of zeros of a block, for reports.

    ======  =======  ============================================
    values  Operand  a Fisher diagonal
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
