"""Drops by rank: entries survive with a probability that grows with the rank of their magnitude in their row."""

import numpy as np
from numba import njit

from streammerge.kernels.blocks import BLOCK, bits_from_f32, round_out, widen, words
from streammerge.kernels.deltas import LARGEST, MAGNITUDE
from streammerge.kernels.merge import _elect

_DIGIT = 11
_BUCKETS = 1 << _DIGIT
_INFINITE = np.uint32(0x7F800000)


@njit(nogil=True, cache=True)
def _sort(entries, other, counts, n):
    """Sort packed (pattern << 32 | place) by pattern, in three digits from the lowest; return the sorted array."""
    for digit in range(3):
        shift = np.uint64(32 + _DIGIT * digit)
        counts[:] = 0
        for i in range(n):
            counts[np.int64((entries[i] >> shift) & np.uint64(_BUCKETS - 1))] += 1
        if counts[np.int64((entries[0] >> shift) & np.uint64(_BUCKETS - 1))] == n:
            continue  # one bucket holds all: the low digits of differences of bf16 numbers are mostly zero
        total = 0
        for bucket in range(_BUCKETS):
            count = counts[bucket]
            counts[bucket] = total
            total += count
        for i in range(n):
            bucket = np.int64((entries[i] >> shift) & np.uint64(_BUCKETS - 1))
            other[counts[bucket]] = entries[i]
            counts[bucket] += 1
        entries, other = other, entries
    return entries


@njit(nogil=True, cache=True, error_model="numpy")
def _probabilities(delta, n, low, spread, entries, other, counts, q):
    """Write low + spread * (r - 1) / (n - 1) for the mid-rank r, from 1, of each magnitude."""
    if spread == 0.0 or n == 1:
        q[:n] = low + spread * 0.5
        return
    for i in range(n):
        key = np.uint64(bits_from_f32(delta[i]) & MAGNITUDE)
        entries[i] = (key << np.uint64(32)) | np.uint64(i)
    ordered = _sort(entries, other, counts, n)
    first = 0
    while first < n:
        key = ordered[first] >> np.uint64(32)
        last = first + 1
        while last < n and ordered[last] >> np.uint64(32) == key:
            last += 1
        probability = low + spread * (0.5 * (first + last - 1) / (n - 1))
        for at in range(first, last):
            q[np.int64(ordered[at] & np.uint64(0xFFFFFFFF))] = probability
        first = last


@njit(nogil=True, cache=True)
def _drop(delta, n, element, key, q, w):
    """Zero the entries that do not survive; return how many do. What is not finite always does: it must be found."""
    kept = 0
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        shift = words(element + start, m, key, w)
        for i in range(m):
            limit = np.int64(np.floor(q[start + i] * 4294967296.0 + 0.5))
            infinite = (bits_from_f32(delta[start + i]) & MAGNITUDE) >= _INFINITE
            keep = np.int64(w[shift + i]) < limit or infinite
            delta[start + i] = delta[start + i] if keep else np.float32(0)
            kept += keep
    return kept


@njit(nogil=True, cache=True)
def _widen_row(half, full, offset, code, n, out):
    width = 4 if code == 2 else 2
    for start in range(0, n, BLOCK):
        widen(half, full, offset + start * width, code, min(BLOCK, n - start), out[start:])


@njit(nogil=True, cache=True)
def ranked_abs_sums(
    half, full, offset, code, base_offset, base_code, element, n, length, low, spread, key, partials
):
    """Write the fp64 sum of abs(surviving delta) of each 4096-element block of whole rows into `partials`.

    In the lanes and the order of `deltas.abs_sums`.
    """
    b, x, q = np.empty(length, np.float32), np.empty(length, np.float32), np.empty(length, np.float64)
    entries, other = np.empty(length, np.uint64), np.empty(length, np.uint64)
    counts, w = np.empty(_BUCKETS, np.int64), np.empty(BLOCK + 8, np.uint32)
    lanes = np.zeros(8, np.float64)
    for first in range(0, n, length):
        _widen_row(half, full, base_offset + first * (4 if base_code == 2 else 2), base_code, length, b)
        _widen_row(half, full, offset + first * (4 if code == 2 else 2), code, length, x)
        for i in range(length):
            x[i] = x[i] - b[i]
        _probabilities(x, length, low, spread, entries, other, counts, q)
        _drop(x, length, element + first, key, q, w)
        for i in range(length):
            at = first + i
            size = abs(x[i])
            lanes[at & 7] += np.float64(size) if size <= LARGEST else 0.0
            if (at & 4095) == 4095 or at == n - 1:
                partials[at >> 12] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + (
                    (lanes[4] + lanes[5]) + (lanes[6] + lanes[7])
                )
                lanes[:] = 0.0


@njit(nogil=True, cache=True, error_model="numpy")
def ranked_merge(half, full, offsets, codes, base_offset, base_code, element, n, length,
                 lows, spreads, unbiased, keys, coefficients, weights,
                 elect, zero_sign, normalize, divisor, scale, out_offset, out_code, kept, signs):  # fmt: skip
    """Do what `merge.task_vector_merge` does, for rows of `length` elements and drops by rank.

    Where `unbiased` an entry that survives is divided by the probability that it does.
    """
    b, x, q = np.empty(length, np.float32), np.empty(length, np.float32), np.empty(length, np.float64)
    entries, other = np.empty(length, np.uint64), np.empty(length, np.uint64)
    counts, w = np.empty(_BUCKETS, np.int64), np.empty(BLOCK + 8, np.uint32)
    up, down = np.empty(length, np.float64), np.empty(length, np.float64)
    up_weight, down_weight = np.empty(length, np.float64), np.empty(length, np.float64)
    base_width, out_width = (4 if base_code == 2 else 2), (4 if out_code == 2 else 2)
    bad = 0
    for first in range(0, n, length):
        _widen_row(half, full, base_offset + first * base_width, base_code, length, b)
        up[:] = 0.0
        down[:] = 0.0
        up_weight[:] = 0.0
        down_weight[:] = 0.0
        for model in range(len(weights)):
            _widen_row(
                half, full, offsets[model] + first * (4 if codes[model] == 2 else 2), codes[model], length, x
            )
            for i in range(length):
                x[i] = x[i] - b[i]
            _probabilities(x, length, lows[model], spreads[model], entries, other, counts, q)
            kept[model] += _drop(x, length, element + first, keys[model], q, w)
            coefficient, weight = coefficients[model], weights[model]
            for i in range(length):
                entry = np.float64(x[i])
                if unbiased:
                    entry = entry / q[i] if x[i] != np.float32(0) else entry
                tau = coefficient * entry
                if elect:
                    up[i] += 0.0 if tau < 0.0 else tau
                    down[i] -= tau if tau < 0.0 else 0.0
                    up_weight[i] += weight if tau > 0.0 else 0.0
                    down_weight[i] += weight if tau < 0.0 else 0.0
                else:
                    up[i] += tau
        if elect:
            signs[0] += _elect(length, up, down, up_weight, down_weight, zero_sign, normalize, up)
        elif divisor != 1.0:
            for i in range(length):
                up[i] /= divisor
        if out_code >= 0:
            for i in range(length):
                up[i] = np.float64(b[i]) + scale * up[i]
            for start in range(0, length, BLOCK):
                m = min(BLOCK, length - start)
                bad += round_out(
                    up[start:], m, half, full, out_offset + (first + start) * out_width, out_code
                )
    return bad
