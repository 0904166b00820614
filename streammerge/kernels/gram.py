"""Dot products of models or task vectors per group of elements, and sums with different weights for each row."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from streammerge.kernels import loop, njit
from streammerge.kernels.blocks import BLOCK, round_at, widen_at
from streammerge.kernels.deltas import LARGEST, delta_block, scratch
from streammerge.kernels.widths import width_of


@loop()
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


def _products_of(pairs):
    """Return what adds the products of `pairs` of two runs of fp64 to eight sums each, which stay in registers.

    It takes the addresses of the sums (8 fp64 a pair) and of the two runs, and their length, a multiple of 8. Vectors
    are spelled out, since LLVM does not see that the sums overlap no run, and would keep them in memory.
    """

    @intrinsic
    def add(typing_context, sums, x, y, n):
        eight = ir.VectorType(ir.DoubleType(), 8)

        def build(context, builder, signature, args):
            def vector_at(address, index):
                pointer = builder.inttoptr(address, ir.DoubleType().as_pointer())
                return builder.bitcast(builder.gep(pointer, [index]), eight.as_pointer())

            places = [vector_at(args[0], ir.Constant(args[3].type, 8 * i)) for i in range(len(pairs))]
            totals = [cgutils.alloca_once_value(builder, builder.load(place, align=8)) for place in places]
            begin, step = ir.Constant(args[3].type, 0), ir.Constant(args[3].type, 8)
            with cgutils.for_range_slice(builder, begin, args[3], step, args[3].type) as (index, _):
                runs = [builder.load(vector_at(address, index), align=8) for address in args[1:3]]
                for total, (i, j) in zip(totals, pairs, strict=True):
                    builder.store(builder.fadd(builder.load(total), builder.fmul(runs[i], runs[j])), total)
            for place, total in zip(places, totals, strict=True):
                builder.store(builder.load(total), place, align=8)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp, types.intp), build

    return add


_add_product = _products_of([(0, 1)])
_add_three_products = _products_of([(0, 0), (0, 1), (1, 1)])


@loop()
def _add_products(k, m, x, lanes):
    """Add the products of a block of all pairs of vectors, (k, BLOCK), to their sums, (pairs, 8)."""
    padded = (m + 7) & ~7
    if k == 2:
        _add_three_products(lanes.ctypes.data, x[0].ctypes.data, x[1].ctypes.data, padded)
        return
    pair = 0
    for i in range(k):
        for j in range(i, k):
            _add_product(lanes[pair].ctypes.data, x[i].ctypes.data, x[j].ctypes.data, padded)
            pair += 1


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
    room = b, delta, np.empty((k, BLOCK), np.float64), np.empty((len(sums[0]), 8), np.float64), buffers
    _dots(operands, base, span, length, terms, sums, room)


@loop()
def _dots(operands, base, span, length, terms, sums, room):
    half, full, offsets, codes = operands
    base_half, base_full, base_offset, base_code = base
    base_width = width_of(base_code)
    element, n = span
    task_vectors, masks, rescales = terms
    drops, drop_keys, cuts, cut_keys = masks
    k = len(offsets)
    b, delta, x, lanes, buffers = room
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
            _add_products(k, m, x, lanes)
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
    b, delta, total = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float64)
    room = b, delta, total, scratch()
    return _weigh_rows(operands, base, span, length, terms, weights, out, kept, room)


@loop()
def _weigh_rows(operands, base, span, length, terms, weights, out, kept, room):
    b, delta, total, buffers = room
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
