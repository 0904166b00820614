"""The fused apply loops: a weighted sum of models, and a merge of masked task vectors."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streammerge.kernels import loop, njit
from streammerge.kernels.blocks import BLOCK, divide, divides_fast, round_at, widen_at
from streammerge.kernels.deltas import delta_block, scratch
from streammerge.kernels.few import add_few, elect_few, few_serve, is_few, weigh_few
from streammerge.kernels.widths import width_of


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
    x, total, first = (
        np.empty(BLOCK, np.float32),
        np.empty(BLOCK, np.float64),
        np.empty(len(weights), np.int64),
    )
    return _weigh(models, weights, divisor, n, out, x, total, first)


@loop()
def _weigh(models, weights, divisor, n, out, x, total, first):
    half, full, offsets, codes = models
    out_half, out_full, out_offset, out_code = out
    out_width = width_of(out_code)
    k, fast, few = len(weights), divides_fast(weights, divisor), few_serve(codes, weights, divisor)
    bad = 0
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        if few:
            for i in range(k):
                first[i] = (offsets[i] >> 1) + start
            weigh_few(m, half, first, weights, divisor, total)
        else:
            total[:] = 0.0
            for i in range(k):
                widen_at(half, full, offsets[i] + start * width_of(codes[i]), codes[i], m, x)
                weight = weights[i]
                for at in range(m):
                    total[at] += weight * np.float64(x[at])
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
    no_base = np.full(BLOCK, -0.0, np.float32)  # added to a number, it leaves the number's bits as they are
    room = deltas, b, no_base, merged, result, _totals(), scratch()
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
    counted = normalize and _counts_serve(weights, coefficients)
    fast = divides_fast(coefficients, divisor)
    few = is_few(k) and out_code >= 0 and (elect or divisor == 1.0 or fast)
    deltas, b, no_base, merged, result, totals, buffers = room
    merged = merged if elect or few else totals.positive
    # With further outputs, the sum that all of them scale is written, without the base.
    added = b if len(scales) == 0 else no_base
    factor = scale if len(scales) == 0 else 1.0
    into = result if len(scales) == 0 else merged
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
        if few and elect:
            elect_few(m, deltas, BLOCK, coefficients, weights, normalize, zero_sign, added, factor, into)
        elif few:
            add_few(m, deltas, coefficients, divisor, added, factor, into)
        elif elect:
            signs[0] += _elect_totals(m, totals, weights[0], zero_sign, normalize, counted, merged)
        elif divisor != 1.0:
            divide(merged, m, divisor, fast)
        if out_code >= 0:
            for other in range(len(scales)):
                _shift(m, b, scales[other], merged, result)
                place = other_offsets[other] + start * out_width
                other_bad[other] += round_at(result, m, out_half, out_full, place, out_code)
            if not few or len(scales) > 0:
                _shift(m, b, scale, merged, result)
            bad += round_at(result, m, out_half, out_full, out_offset + start * out_width, out_code)
    return bad
