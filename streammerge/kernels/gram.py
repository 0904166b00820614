"""Dot products of models or task vectors per group of elements, and sums with different weights for each row."""

import numpy as np

from streammerge.kernels import njit
from streammerge.kernels.blocks import BLOCK, round_at, widen_at
from streammerge.kernels.deltas import LARGEST, delta_block, scratch
from streammerge.kernels.operands import width_of


@njit(nogil=True)
def _load(half, full, offset, code, n, task_vectors, rescale, delta, out):
    """Widen a block of a vector to fp64, (>=n,): an operand as it is or, with `task_vectors`, what `delta` holds.

    Non-finite values count as 0: they show in the output, at their own elements alone. Entries behind `n`, up to a
    multiple of 8, are zero.
    """
    if task_vectors:
        for i in range(n):
            out[i] = rescale * np.float64(delta[i]) if abs(delta[i]) <= LARGEST else 0.0
    else:
        widen_at(half, full, offset, code, n, delta)
        for i in range(n):
            out[i] = np.float64(delta[i]) if abs(delta[i]) <= LARGEST else 0.0
    out[n : (n + 7) & ~7] = 0.0


@njit(nogil=True)
def dots(operands, base, span, length, terms, sums):
    """Write the fp64 dot products of all pairs of vectors over every `length` elements.

    The pairs follow the upper triangle, row by row. Each product is summed in eight lanes that are added pairwise at the
    end of a group: the order does not depend on block, thread or vector width.

    ========  =======================  ============================================
    operands  Operands                 the vectors, or the models of the task vectors, k of them
    base      Operand                  the base; read for task vectors only
    span      Span                     the block
    length    int64                    elements of a group
    terms     Terms                    task vectors, or the operands themselves
    sums      float64 (groups, pairs)  written
    ========  =======================  ============================================
    """
    half, full, offsets, codes = operands
    base_half, base_full, base_offset, base_code = base
    base_width = width_of(base_code)
    element, n = span
    task_vectors, masks, rescales = terms
    drops, drop_keys, cuts, cut_keys = masks
    k = len(offsets)
    b, delta, buffers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), scratch()
    x = np.empty((k, BLOCK), np.float64)
    lanes = np.empty((len(sums[0]), 8), np.float64)
    for group in range(len(sums)):
        lanes[:] = 0.0
        stop = min(n, (group + 1) * length)
        for start in range(group * length, stop, BLOCK):
            m = min(BLOCK, stop - start)
            if task_vectors:
                widen_at(base_half, base_full, base_offset + start * base_width, base_code, m, b)
            for model in range(k):
                at = offsets[model] + start * width_of(codes[model])
                rescale = 1.0
                if task_vectors:
                    rescale = rescales[model]
                    drop, drop_key, cut, cut_key = (
                        drops[model],
                        drop_keys[model],
                        cuts[model],
                        cut_keys[model],
                    )
                    delta_block(
                        half,
                        full,
                        at,
                        codes[model],
                        b,
                        element + start,
                        m,
                        drop,
                        drop_key,
                        cut,
                        cut_key,
                        delta,
                        buffers,
                    )
                _load(half, full, at, codes[model], m, task_vectors, rescale, delta, x[model])
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
def weigh_rows(operands, base, span, length, terms, weights, out, kept):
    """Write each row as the sum of its vectors with its own weights; return the number of non-finite results.

    With task vectors, the base is added.

    ========  =================  ============================================
    operands  Operands           the vectors, or the models of the task vectors, k of them
    base      Operand            the base; read for task vectors only
    span      Span               the block, of whole rows
    length    int64              elements of a row
    terms     Terms              task vectors, or the operands themselves
    weights   float64 (rows, k)  the weights
    out       Operand            the output
    kept      int64 (k,)         survivors of each task vector, added to
    ========  =================  ============================================
    """
    b, delta, buffers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), scratch()
    total = np.empty(BLOCK, np.float64)
    half, full, offsets, codes = operands
    base_half, base_full, base_offset, base_code = base
    base_width = width_of(base_code)
    element, n = span
    task_vectors, masks, rescales = terms
    drops, drop_keys, cuts, cut_keys = masks
    out_half, out_full, out_offset, out_code = out
    out_width = width_of(out_code)
    bad = 0
    for row in range(len(weights)):
        stop = min(n, (row + 1) * length)
        for start in range(row * length, stop, BLOCK):
            m = min(BLOCK, stop - start)
            total[:] = 0.0
            if task_vectors:
                widen_at(base_half, base_full, base_offset + start * base_width, base_code, m, b)
            for model in range(len(offsets)):
                at = offsets[model] + start * width_of(codes[model])
                weight = weights[row, model]
                if task_vectors:
                    drop, drop_key, cut, cut_key = (
                        drops[model],
                        drop_keys[model],
                        cuts[model],
                        cut_keys[model],
                    )
                    kept[model] += delta_block(
                        half,
                        full,
                        at,
                        codes[model],
                        b,
                        element + start,
                        m,
                        drop,
                        drop_key,
                        cut,
                        cut_key,
                        delta,
                        buffers,
                    )
                    weight *= rescales[model]
                else:
                    widen_at(half, full, at, codes[model], m, delta)
                for i in range(m):
                    total[i] += weight * np.float64(delta[i])
            if task_vectors:
                for i in range(m):
                    total[i] = np.float64(b[i]) + total[i]
            bad += round_at(total, m, out_half, out_full, out_offset + start * out_width, out_code)
    return bad
