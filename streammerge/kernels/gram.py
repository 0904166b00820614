"""Dot products of models or task vectors per group of elements, and sums with different weights for each row."""

import numpy as np

from streammerge.kernels import njit
from streammerge.kernels.blocks import BLOCK, round_out, widen, widen_at
from streammerge.kernels.deltas import LARGEST, delta_block, scratch
from streammerge.kernels.operands import Mask, width_of


@njit(nogil=True)
def _load(operands, first, n, b, span, terms, delta, buffers, out):
    """Widen a block of every vector to fp64, (k, >=n): the operands themselves, or their task vectors.

    Non-finite values count as 0; they show in the output at their own elements only.

    `b` holds the block of the base in fp32, (n,). Entries after `n`, up to a multiple of 8, are zero.
    """
    half, full, offsets, codes = operands
    drops, drop_keys, cuts, cut_keys = terms.masks
    for model in range(len(offsets)):
        at = offsets[model] + first * width_of(codes[model])
        if terms.task_vectors:
            mask = Mask(drops[model], drop_keys[model], cuts[model], cut_keys[model])
            delta_block(half, full, at, codes[model], b, span.element + first, n, mask, delta, buffers)
            rescale = terms.rescales[model]
            for i in range(n):
                out[model, i] = rescale * np.float64(delta[i]) if abs(delta[i]) <= LARGEST else 0.0
        else:
            widen_at(half, full, at, codes[model], n, delta)
            for i in range(n):
                out[model, i] = np.float64(delta[i]) if abs(delta[i]) <= LARGEST else 0.0
        out[model, n : (n + 7) & ~7] = 0.0


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
    k = len(operands.offsets)
    b, delta, buffers = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), scratch()
    x = np.empty((k, BLOCK), np.float64)
    lanes = np.empty((len(sums[0]), 8), np.float64)
    for group in range(len(sums)):
        lanes[:] = 0.0
        stop = min(span.n, (group + 1) * length)
        for start in range(group * length, stop, BLOCK):
            m = min(BLOCK, stop - start)
            if terms.task_vectors:
                widen(base, start, m, b)
            _load(operands, start, m, b, span, terms, delta, buffers, x)
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
    task_vectors, masks, rescales = terms
    drops, drop_keys, cuts, cut_keys = masks
    bad = 0
    for row in range(len(weights)):
        stop = min(span.n, (row + 1) * length)
        for start in range(row * length, stop, BLOCK):
            m = min(BLOCK, stop - start)
            total[:] = 0.0
            if task_vectors:
                widen(base, start, m, b)
            for model in range(len(offsets)):
                at = offsets[model] + start * width_of(codes[model])
                weight = weights[row, model]
                if task_vectors:
                    mask = Mask(drops[model], drop_keys[model], cuts[model], cut_keys[model])
                    kept[model] += delta_block(
                        half, full, at, codes[model], b, span.element + start, m, mask, delta, buffers
                    )
                    weight *= rescales[model]
                else:
                    widen_at(half, full, at, codes[model], m, delta)
                for i in range(m):
                    total[i] += weight * np.float64(delta[i])
            if task_vectors:
                for i in range(m):
                    total[i] = np.float64(b[i]) + total[i]
            bad += round_out(total, m, out, start)
    return bad
