"""Scores and merges of parameter competition on the tiles of `deltas.survivors`; `algebra/competition.py` has the formulas."""

import numpy as np

from streammerge.kernels import njit
from streammerge.kernels.blocks import BLOCK, bits_from_f32
from streammerge.kernels.elementary import exp
from streammerge.kernels.scores import pattern
from streammerge.numerics.finite import UNKNOWN

_ZERO = np.int64(0x3F800000)
_SMALL = 2.0**-6
_LEAST = 1e-12
_SIZE = np.int64(0x7FFFFFFF)


@njit(nogil=True)
def size_patterns(deltas, coefficient, patterns):
    """Write the fp32 pattern of the magnitude of each weighted entry.

    ===========  ==============  ============================================
    deltas       float32 (1, n)  the surviving task vector of a tile
    coefficient  float64         its factor
    patterns     uint32 (n,)     written
    ===========  ==============  ============================================
    """
    entries = deltas[0]
    for i in range(len(patterns)):
        patterns[i] = pattern(abs(coefficient * np.float64(entries[i])))


@njit(inline="always")
def _clamped(entry, low, high):
    """Return an entry with its magnitude in [low, high]; 0 and non-finite entries stay as they are."""
    size = abs(entry)
    held = low if size < low else high if size > high else size
    signed = held if entry > 0.0 else -held
    return signed if 0.0 < size < np.inf else entry


@njit(nogil=True)
def _hold(deltas, coefficients, ranges, start, m, held, total):
    """Write the clamped entries of a block, (k, >=m), and their sum, (>=m,), in the order of the models."""
    total[:] = 0.0
    for model in range(len(deltas)):
        coefficient, low, high = coefficients[model], ranges[model, 0], ranges[model, 1]
        entries, own = deltas[model, start : start + m], held[model]
        for i in range(m):
            own[i] = _clamped(coefficient * np.float64(entries[i]), low, high)
            total[i] += own[i]


@njit(nogil=True, error_model="numpy")
def _scores(held, total, low, high, n_models, m, out):
    """Write the fp32 scores of a model's clamped entries."""
    least = high > low
    span = high - low if least else 1.0
    beyond = False
    for i in range(m):
        size = abs(held[i])
        share = ((low if size < low else size) - low) / span if least else 0.0
        x = held[i] * total[i]
        square = x * x
        near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0))))
        out[i] = np.float32(exp(n_models * (share * share - 1.0)) * near)
        beyond |= not abs(x) < _SMALL
    if not beyond:  # products of two task vectors' entries usually are small
        return
    for i in range(m):
        x = held[i] * total[i]
        if not abs(x) < _SMALL:
            size = abs(held[i])
            share = ((low if size < low else size) - low) / span if least else 0.0
            fall = exp(-2.0 * abs(x))
            far = (1.0 - fall) / (1.0 + fall)
            out[i] = np.float32(exp(n_models * (share * share - 1.0)) * (far if x > 0.0 else -far))


@njit(nogil=True)
def competition_patterns(deltas, coefficients, ranges, place, patterns):
    """Write the pattern of one model's score of each element; non-finite ones rank above all others.

    ============  ===============  ============================================
    deltas        float32 (k, n)   the surviving task vectors of a tile
    coefficients  float64 (k,)     their factors
    ranges        float64 (k, 2)   the clamp of each model's magnitudes
    place         int64            the model that is scored
    patterns      uint32 (n,)      written
    ============  ===============  ============================================
    """
    k = len(deltas)
    held, total = np.empty((k, BLOCK), np.float64), np.empty(BLOCK, np.float64)
    scores = np.empty(BLOCK, np.float32)
    for start in range(0, len(patterns), BLOCK):
        m = min(BLOCK, len(patterns) - start)
        _hold(deltas, coefficients, ranges, start, m, held, total)
        _scores(held[place], total, ranges[place, 0], ranges[place, 1], np.float64(k), m, scores)
        here = patterns[start : start + m]
        for i in range(m):
            bits = np.int64(bits_from_f32(scores[i]))
            size = bits & _SIZE
            ranked = _ZERO + (size if bits == size else -size)
            here[i] = np.uint32(ranked) if abs(total[i]) < np.inf else np.uint32(UNKNOWN)


@njit(nogil=True, error_model="numpy")
def balanced_merge(base, deltas, coefficients, ranges, winners, scale, out):
    """Write the base plus the scaled mean of the task vectors, weighted by their scores.

    ============  ===============  ============================================
    base          float32 (n,)     the base
    deltas        float32 (k, n)   the surviving task vectors of a tile
    coefficients  float64 (k,)     their factors
    ranges        float64 (k, 2)   the clamp of each model's magnitudes
    winners       float64 (k, 2)   the threshold of each model's scores, and its highest score
    scale         float64          the factor of the merged task vector
    out           float64 (n,)     written
    ============  ===============  ============================================
    """
    k = len(deltas)
    held, total = np.empty((k, BLOCK), np.float64), np.empty(BLOCK, np.float64)
    merged, weights = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    scores = np.empty(BLOCK, np.float32)
    for start in range(0, len(out), BLOCK):
        m = min(BLOCK, len(out) - start)
        _hold(deltas, coefficients, ranges, start, m, held, total)
        merged[:] = 0.0
        weights[:] = 0.0
        for model in range(k):
            threshold, top = winners[model, 0], winners[model, 1]
            if not top > threshold:
                continue
            own, span = held[model], top - threshold
            _scores(own, total, ranges[model, 0], ranges[model, 1], np.float64(k), m, scores)
            for i in range(m):
                score = np.float64(scores[i])
                weight = ((threshold if score < threshold else score) - threshold) / span
                merged[i] += weight * own[i]
                weights[i] += weight
        here = out[start : start + m]
        for i in range(m):
            weight = weights[i]
            mean = merged[i] / (_LEAST if weight < _LEAST else weight)
            change = mean if abs(total[i]) < np.inf else total[i]
            here[i] = np.float64(base[start + i]) + scale * change
