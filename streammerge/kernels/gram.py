"""Dot products of models, or of task vectors, group by group; and sums whose weights differ from row to row."""

import numpy as np

from streammerge.kernels import njit
from streammerge.kernels.blocks import BLOCK, round_out, widen
from streammerge.kernels.deltas import LARGEST, delta_block, scratch


@njit(nogil=True)
def _load(
    half,
    full,
    offsets,
    codes,
    first,
    n,
    deltas,
    b,
    element,
    drops,
    drop_keys,
    cuts,
    cut_keys,
    rescales,
    delta,
    buffers,
    out,
):
    """Widen a block of every vector to fp64: the models as they are or, with `deltas`, their task vectors.

    What is not finite counts as 0: it shows in the output, at its own element alone.

    `b` holds the block of the base in fp32. What lies behind `n`, up to a multiple of 8, is zero.
    """
    for model in range(len(offsets)):
        at = offsets[model] + first * (4 if codes[model] == 2 else 2)
        if deltas:
            delta_block(
                half,
                full,
                at,
                codes[model],
                b,
                element + first,
                n,
                drops[model],
                drop_keys[model],
                cuts[model],
                cut_keys[model],
                delta,
                buffers,
            )
            rescale = rescales[model]
            for i in range(n):
                out[model, i] = rescale * np.float64(delta[i]) if abs(delta[i]) <= LARGEST else 0.0
        else:
            widen(half, full, at, codes[model], n, delta)
            for i in range(n):
                out[model, i] = np.float64(delta[i]) if abs(delta[i]) <= LARGEST else 0.0
        out[model, n : (n + 7) & ~7] = 0.0


@njit(nogil=True)
def dots(
    half,
    full,
    offsets,
    codes,
    base_offset,
    base_code,
    element,
    n,
    length,
    deltas,
    drops,
    drop_keys,
    cuts,
    cut_keys,
    rescales,
    sums,
):
    """Write the fp64 dot products of all pairs of vectors over every `length` elements into `sums`.

    Pairs are those of the upper triangle, row by row. Each product is summed in eight lanes, added pairwise at
    the end of a group: a fixed order, whatever the chunk, thread or vector width.
    """
    k = len(offsets)
    b, delta, buffers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), scratch()
    x = np.empty((k, BLOCK), np.float64)
    lanes = np.empty((len(sums[0]), 8), np.float64)
    for group in range(len(sums)):
        lanes[:] = 0.0
        stop = min(n, (group + 1) * length)
        for start in range(group * length, stop, BLOCK):
            m = min(BLOCK, stop - start)
            if deltas:
                widen(half, full, base_offset + start * (4 if base_code == 2 else 2), base_code, m, b)
            _load(
                half,
                full,
                offsets,
                codes,
                start,
                m,
                deltas,
                b,
                element,
                drops,
                drop_keys,
                cuts,
                cut_keys,
                rescales,
                delta,
                buffers,
                x,
            )
            pair = 0
            for i in range(k):
                for j in range(i, k):
                    lane = lanes[pair]
                    for first in range(0, m, 8):
                        for at in range(8):
                            lane[at] += x[i, first + at] * x[j, first + at]
                    pair += 1
        for pair in range(len(lanes)):
            lane = lanes[pair]
            sums[group, pair] = ((lane[0] + lane[1]) + (lane[2] + lane[3])) + (
                (lane[4] + lane[5]) + (lane[6] + lane[7])
            )


@njit(nogil=True)
def weigh_rows(
    half,
    full,
    offsets,
    codes,
    base_offset,
    base_code,
    element,
    n,
    length,
    deltas,
    drops,
    drop_keys,
    cuts,
    cut_keys,
    rescales,
    weights,
    out_offset,
    out_code,
    kept,
):
    """Write, for every row of `length` elements, the sum of its vectors by its own weights; count the non-finite.

    `weights` is (rows, vectors). With `deltas` the base is added, and the survivors of each model to `kept`.
    """
    k = len(offsets)
    b, delta, buffers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), scratch()
    total = np.empty(BLOCK, np.float64)
    out_width = 4 if out_code == 2 else 2
    bad = 0
    for row in range(len(weights)):
        stop = min(n, (row + 1) * length)
        for start in range(row * length, stop, BLOCK):
            m = min(BLOCK, stop - start)
            total[:] = 0.0
            if deltas:
                widen(half, full, base_offset + start * (4 if base_code == 2 else 2), base_code, m, b)
            for model in range(k):
                at = offsets[model] + start * (4 if codes[model] == 2 else 2)
                weight = weights[row, model]
                if deltas:
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
                    weight *= rescales[model]
                else:
                    widen(half, full, at, codes[model], m, delta)
                for i in range(m):
                    total[i] += weight * np.float64(delta[i])
            if deltas:
                for i in range(m):
                    total[i] = np.float64(b[i]) + total[i]
            bad += round_out(total, m, half, full, out_offset + start * out_width, out_code)
    return bad
