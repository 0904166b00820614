"""Drops by rank: the probability to survive grows with the rank of an entry's magnitude in its row."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streammerge.kernels import loop, njit
from streammerge.kernels.blocks import BLOCK, bits_from_f32, round_at, widen_at, words
from streammerge.kernels.deltas import LARGEST, MAGNITUDE
from streammerge.kernels.few import elect_few, is_few
from streammerge.kernels.magnitudes import alone
from streammerge.kernels.merge import _add_weights, _elect, _shift, _sum_signs
from streammerge.kernels.mid_ranks import INFINITE, Ranking, ranking, shares_by_rank
from streammerge.kernels.widths import width_of


class RowBuffers(NamedTuple):
    """The scratch buffers of `_survivors`; n is the length of a row."""

    delta: NDArray[np.float32]
    """(n,): the row of the model minus that of the base"""
    words: NDArray[np.uint32]
    """(n + 8,): random words"""
    ranking: Ranking


@njit(nogil=True)
def _row_buffers(length):
    """Return buffers for rows of `length` elements."""
    return RowBuffers(np.empty(length, np.float32), np.empty(length + 8, np.uint32), ranking(length))


@loop()
def _survivors(n, element, key, low, spread, unbiased, buffers, out):
    """Write the surviving entries of the row in `buffers.delta` into `out`, fp64 (n,), else 0; return their number.

    An entry survives with probability low + spread * (r - 1) / (n - 1), where r is the mid-rank of its magnitude; if
    `unbiased` it is divided by that. Non-finite values always survive, so that the output shows them.
    """
    delta, w, by_rank = buffers
    shift = words(element, n, key, w)
    if spread == 0.0 or n == 1:
        out[:n] = low + spread * 0.5
    else:
        shares_by_rank(delta, n, low, spread, by_rank, out)
    drawn = w[shift : shift + n]
    return _draw_and_divide(n, delta, drawn, out) if unbiased else _draw(n, delta, drawn, out)


@loop()
def _draw(n, delta, drawn, out):
    """Replace the probabilities in `out` by the entries that survive, else 0; return their number."""
    kept = 0
    for i in range(n):
        # The comparison is one of integers, all of which fp64 holds exactly.
        keep = np.float64(drawn[i]) < np.floor(out[i] * 4294967296.0 + 0.5)
        keep |= (bits_from_f32(delta[i]) & MAGNITUDE) >= INFINITE
        out[i] = np.float64(delta[i]) if keep else 0.0
        kept += keep
    return kept


@loop(error_model="numpy")
def _draw_and_divide(n, delta, drawn, out):
    """Do the same as `_draw`, and divide the entries by their probabilities."""
    kept = 0
    for i in range(n):
        keep = np.float64(drawn[i]) < np.floor(out[i] * 4294967296.0 + 0.5)
        keep |= (bits_from_f32(delta[i]) & MAGNITUDE) >= INFINITE
        scaled = np.float64(delta[i]) / out[i]
        out[i] = scaled if keep else 0.0
        kept += keep
    return kept


@loop()
def _widen_row(half, full, offset, code, n, out):
    for start in range(0, n, BLOCK):
        widen_at(half, full, offset + start * width_of(code), code, min(BLOCK, n - start), out[start:])


@loop()
def _delta_row(half, full, offset, code, base, n, out):
    """Write a model's row minus the base's, in fp32."""
    _widen_row(half, full, offset, code, n, out)
    for at in range(n):
        out[at] -= base[at]


@njit(nogil=True)
def ranked_abs_sums(model, base, span, length, drop, partials):
    """Write the fp64 sum of abs(surviving entry) of each run of 4096 elements, for whole rows.

    The order of the sum is that of `magnitudes.abs_sums`.

    ========  =====================  ============================================
    model     Operands               one model
    base      Operand                the base
    span      Span                   the block; its first element is a multiple of 4096
    length    int64                  elements of a row
    drop      RankDrops              its drop; not unbiased
    partials  float64 (n / 4096 up)  written
    ========  =====================  ============================================
    """
    b, left = np.empty(length, np.float32), np.empty(length, np.float64)
    _ranked_abs_sums(
        model, base, span, length, drop, partials, b, left, np.zeros(8, np.float64), _row_buffers(length)
    )


@loop()
def _ranked_abs_sums(model, base, span, length, drop, partials, b, left, lanes, buffers):
    half, full, offset, code = alone(model)
    base_half, base_full, base_offset, base_code = base
    width, base_width = width_of(code), width_of(base_code)
    element, n = span
    key, low, spread, delta = drop.keys[0], drop.lows[0], drop.spreads[0], buffers.delta
    for first in range(0, n, length):
        _widen_row(base_half, base_full, base_offset + first * base_width, base_code, length, b)
        _delta_row(half, full, offset + first * width, code, b, length, delta)
        _survivors(length, element + first, key, low, spread, False, buffers, left)
        start = 0
        while start < length:
            part = (first + start) >> 12
            stop = min(length, ((part + 1) << 12) - first)
            _add_sizes(left, first, start, stop, lanes)
            if first + stop == min(n, (part + 1) << 12):
                partials[part] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + (
                    (lanes[4] + lanes[5]) + (lanes[6] + lanes[7])
                )
                lanes[:] = 0.0
            start = stop


@loop()
def _add_sizes(left, first, start, stop, lanes):
    """Add abs(left[start:stop]) to the lanes of the elements, of which `first` is that of ``left[0]``."""
    i = start
    while i < stop:
        if (first + i) & 7 == 0 and i + 8 <= stop:
            for j in range(8):
                size = abs(left[i + j])
                lanes[j] += size if size <= np.float64(LARGEST) else 0.0  # without NaN and infinity
            i += 8
        else:
            size = abs(left[i])
            lanes[(first + i) & 7] += size if size <= np.float64(LARGEST) else 0.0
            i += 1


@njit(nogil=True)
def ranked_merge(models, base, span, length, drops, how, out, tally):
    """Do the same as `merge.task_vector_merge` for whole rows and drops by rank.

    ======  ===========  ============================================
    models  Operands     the models, k of them
    base    Operand      the base
    span    Span         the block, of whole rows
    length  int64        elements of a row
    drops   RankDrops    the drops
    how     Combination  weights, signs, scale
    out     Operand      the output; of code `NOTHING` it is not written
    tally   Tally        survivors and elected signs, added to
    ======  ===========  ============================================
    """
    lefts, sums = np.empty(len(models.offsets) * length, np.float64), np.empty((5, BLOCK), np.float64)
    rooms = lefts, sums[0], sums[1], sums[2], sums[3], sums[4]
    b = np.empty(length, np.float32)
    return _ranked_merge(models, base, span, length, drops, how, out, tally, b, rooms, _row_buffers(length))


@loop()
def _ranked_merge(models, base, span, length, drops, how, out, tally, b, rooms, buffers):
    lefts, merged, delta = rooms[0], rooms[5], buffers.delta
    half, full, offsets, codes = models
    base_half, base_full, base_offset, base_code = base
    base_width, out_width = width_of(base_code), width_of(out.code)
    element, n = span
    lows, spreads, unbiased, keys = drops
    few = how.elect and is_few(len(offsets)) and out.code >= 0
    bad = 0
    for first in range(0, n, length):
        _widen_row(base_half, base_full, base_offset + first * base_width, base_code, length, b)
        for model in range(len(offsets)):
            at = offsets[model] + first * width_of(codes[model])
            _delta_row(half, full, at, codes[model], b, length, delta)
            left = lefts[model * length : (model + 1) * length]
            tally.kept[model] += _survivors(
                length, element + first, keys[model], lows[model], spreads[model], unbiased, buffers, left
            )
        for start in range(0, length, BLOCK):  # a row of sums would not stay in the first cache
            m = min(BLOCK, length - start)
            if few:
                at, c, w = lefts[start:], how.coefficients, how.weights
                elect_few(m, at, length, c, w, how.normalize, how.zero_sign, b[start:], how.scale, merged)
            else:
                _merge_block(m, start, length, how, rooms, tally)
                _shift(m, b[start:], how.scale, merged, merged)
            if out.code >= 0:
                at = out.offset + (first + start) * out_width
                bad += round_at(merged, m, out.half, out.full, at, out.code)
    return bad


@loop(error_model="numpy")
def _merge_block(m, start, length, how, rooms, tally):
    """Write the merge of `m` elements of all rows of survivors into the last of the buffers in `rooms`."""
    lefts, up, down, up_weight, down_weight, merged = rooms
    coefficients, weights, elect, zero_sign, normalize, divisor, _ = how
    if elect:
        up[:] = 0.0
        down[:] = 0.0
        up_weight[:] = 0.0
        down_weight[:] = 0.0
    else:
        merged[:] = 0.0
    for model in range(len(weights)):
        left = lefts[model * length + start : model * length + start + m]
        coefficient = coefficients[model]
        if elect:
            _sum_signs(m, left, coefficient, up, down)
            if normalize:
                _add_weights(m, left, coefficient, weights[model], up_weight, down_weight)
        else:
            for i in range(m):
                merged[i] += coefficient * left[i]
    if elect:
        tally.signs[0] += _elect(m, up, down, up_weight, down_weight, zero_sign, normalize, merged)
    elif divisor != 1.0:
        for i in range(m):
            merged[i] /= divisor
