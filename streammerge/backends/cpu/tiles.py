"""The rarer statistics and merges of a loaded piece on the CPU, a slab at a time.

A slab is as many elements as stay in the cache as fp32: those of the base, and of every task vector as drops and cuts
have left it. One kernel makes a slab; those that work on it are short, and never see dtypes, masks or offsets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Applied, Bins, Block, Counts, Operand
from streammerge.algebra.gram_matrix import rows_at_once
from streammerge.algebra.rules import ColumnCombination, SelectedMerge, TouchedMerge, removing
from streammerge.algebra.scores import Importance, Score, Selection, Spread
from streammerge.algebra.task_vectors import TaskVector
from streammerge.numerics.ordered_sum import BLOCK

if TYPE_CHECKING:
    from streammerge.backends.cpu.math import KernelMath

_SLAB = 1 << 15
"""Elements; a multiple of 4096."""
_SLAB_BYTES = 1 << 20
"""Of the base and all task vectors together in fp32, at most: of many models a slab has fewer elements, but a block."""

Divergences = dict[Importance, NDArray[np.float64]]
Span = tuple[int, int]
"""The first element of a slab, counted from that of the piece, and how many there are."""


class Slabs:
    """A piece through the kernels that work on slabs; see `BlockMath` for what the methods return.

    Parameters
    ----------
    math
        Makes the slabs and writes the results.
    divergences
        What is known of the rows of the piece; filled on the way.
    """

    def __init__(self, math: KernelMath, piece: Block, divergences: Divergences) -> None:
        from streammerge.kernels import scores

        self._kernels: Any = scores  # numba erases signatures
        self._math = math
        self._piece = piece
        self._divergences = divergences
        self._room: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

    def _spans(self, unit: int = 1) -> Iterator[Span]:
        """Yield slabs of a multiple of `unit` elements, at least one."""
        fitting = _SLAB_BYTES // (4 * (len(self._piece.models) + 1)) // BLOCK * BLOCK
        size = max(unit, max(BLOCK, min(_SLAB, fitting)) // unit * unit)
        for first in range(0, self._piece.n, size):
            yield first, min(size, self._piece.n - first)

    def _survivors(
        self, vectors: Sequence[TaskVector], span: Span
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], Counts]:
        """Return a slab: of the base, of every task vector, and how many entries survive. The next one takes its room."""
        first, n = span
        k = len(vectors)
        if k not in self._room or self._room[k][0].size < n:
            self._room[k] = np.empty(n, np.float32), np.empty(k * n, np.float32)
        base, deltas = self._room[k][0][:n], self._room[k][1][: k * n].reshape(k, n)
        return base, deltas, self._math.survivors(tuple(vectors), first, base, deltas)

    # --- scores

    def count_keys(self, score: Score, low: int, high: int, shift: int, bins: Bins) -> tuple[int, int]:
        """Count the patterns of a score above `high`, and in the window by bins."""
        above = highest = 0
        for span in self._spans():
            more, top = self._kernels.count_patterns(self._patterns(score, span), low, high, shift, bins)
            above, highest = above + int(more), max(highest, int(top))
        return above, highest

    def ties(self, score: Score, key: int, size: int) -> Counts:
        """Return how many elements have the pattern `key`, per run of `size` elements."""
        counts = np.zeros(-(-self._piece.n // size), np.int64)
        for first, n in self._spans():
            places = first + np.flatnonzero(self._patterns(score, (first, n)) == key)
            counts += np.bincount(places // size, minlength=counts.size)
        return counts

    def _patterns(self, score: Score, span: Span) -> NDArray[np.uint32]:
        patterns = np.empty(span[1], np.uint32)
        if isinstance(score, Spread):
            _, deltas, _ = self._survivors(score.vectors, span)
            self._kernels.spread_patterns(deltas, _rescales(score.vectors), patterns)
        else:
            by_row = self._divergence(score)
            _, deltas, _ = self._survivors((score.vector,), span)
            self._kernels.importance_patterns(deltas, by_row, span[0], self._piece.row_length, patterns)
        return patterns

    def _divergence(self, score: Importance) -> NDArray[np.float64]:
        """Return the divergence of each row of the piece, computed once: before the first slab is written over."""
        if score not in self._divergences:
            vector, length = score.vector, self._piece.row_length
            rows = np.empty(self._piece.n // length, np.float64)
            for first, n in self._spans(length):
                base, deltas, _ = self._survivors((vector,), (first, n))
                y = base.astype(np.float64).reshape(-1, length)
                x = self._math.widened(self._piece.models[vector.model], first, n).astype(np.float64)
                if vector.removes:
                    x = y.ravel() + vector.rescale * deltas[0].astype(np.float64)
                self._kernels.divergences(
                    x.reshape(-1, length), y, rows[first // length : (first + n) // length]
                )
            self._divergences[score] = rows
        return self._divergences[score]

    def _selected(self, selection: Selection | None, span: Span) -> NDArray[np.bool_]:
        if selection is None:
            return np.ones(span[1], np.bool_)
        cut, patterns = selection.cut, self._patterns(selection.score, span)
        kept: NDArray[np.bool_] = patterns >= cut.key if cut.ties == "all" else patterns > cut.key
        if cut.ties == "index":
            before = max(0, cut.limit - self._piece.start - span[0])
            kept[:before] |= patterns[:before] == cut.key
        return kept

    # --- sums and counts

    def squares(self, vectors: tuple[TaskVector, ...], selection: Selection | None) -> NDArray[np.float64]:
        """Return the sums of squares per 4096 elements, (blocks, vectors)."""
        sums = np.empty((-(-self._piece.n // BLOCK), len(vectors)), np.float64)
        for first, n in self._spans():
            selected = self._selected(selection, (first, n))
            _, deltas, _ = self._survivors(vectors, (first, n))
            blocks = sums[first // BLOCK : -(-(first + n) // BLOCK)]
            self._kernels.square_sums(deltas, _rescales(vectors), selected, blocks)
        return sums

    def touches(self, vectors: tuple[TaskVector, ...], epsilon: float) -> Counts:
        """Return how many elements each vector has touched alone, and how many with others."""
        counts = np.zeros((2, len(vectors)), np.int64)
        for span in self._spans():
            _, deltas, _ = self._survivors(vectors, span)
            self._kernels.count_touched(deltas, _rescales(vectors), epsilon, *counts)
        return counts

    def add_column_dots(self, vectors: Sequence[TaskVector], sums: NDArray[np.float64]) -> None:
        """Add the dot products of all pairs over the rows of the piece, a fixed number of rows at a time, to `sums`."""
        columns = self._piece.row_length
        part = np.empty_like(sums)
        for first in range(0, self._piece.n, rows_at_once(columns) * columns):
            stop = min(self._piece.n, first + rows_at_once(columns) * columns)
            part[:] = 0.0
            step = max(columns, _SLAB // columns * columns)
            for start in range(first, stop, step):
                _, terms, rescales, _ = self._terms(vectors, (start, min(step, stop - start)))
                self._kernels.add_products(terms.reshape(len(terms), -1, columns), rescales, part)
            sums += part

    def _terms(
        self, vectors: Sequence[TaskVector], span: Span
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float32], NDArray[np.float64], Counts]:
        """Return the base, the task vectors, their factors, and how many entries survive; or the models alone.

        These are the base, where there is one, and the models.
        """
        if vectors:
            base, deltas, kept = self._survivors(vectors, span)
            return base, deltas, _rescales(vectors), kept
        piece = self._piece
        operands = (*(() if piece.base is None else (piece.base,)), *piece.models)
        models = np.stack([self._math.widened(operand, *span) for operand in operands])
        return None, models, np.ones(len(operands)), np.zeros(len(operands), np.int64)

    # --- merges

    def apply(self, rule: SelectedMerge | TouchedMerge | ColumnCombination, out: Operand) -> Applied:
        """Write the merged piece, slab after slab: the output may lie over an input."""
        bad, kept = 0, np.zeros(len(rule.vectors), np.int64)
        for span in self._spans(self._piece.row_length if isinstance(rule, ColumnCombination) else 1):
            if isinstance(rule, SelectedMerge):
                values, survived = self._select(rule, span)
            elif isinstance(rule, TouchedMerge):
                values, survived = self._touch(rule, span)
            else:
                values, survived = self._combine(rule, span)
            bad += self._math.write(values, out, span[0])
            kept += survived[: kept.size]
        return Applied(bad, tuple(int(n) for n in kept) if removing(rule) else ())

    def _select(self, rule: SelectedMerge, span: Span) -> tuple[NDArray[np.float64], Counts]:
        selected = self._selected(rule.selection, span)
        base, deltas, kept = self._survivors(rule.vectors, span)
        merged = np.empty(span[1])
        weights = np.array([v.weight for v in rule.vectors], np.float64)
        self._kernels.selected_merge(
            base,
            deltas,
            _rescales(rule.vectors),
            weights,
            rule.zero_sign,
            float(rule.floor),
            selected,
            merged,
        )
        if rule.selection is not None:
            kept[:] = np.count_nonzero(selected)
        return merged, kept

    def _touch(self, rule: TouchedMerge, span: Span) -> tuple[NDArray[np.float64], Counts]:
        base, deltas, kept = self._survivors(rule.vectors, span)
        merged = np.empty(span[1])
        factors = np.array(rule.factors, np.float64)
        self._kernels.touched_merge(
            base, deltas, _rescales(rule.vectors), float(rule.epsilon), factors, merged
        )
        return merged, kept

    def _combine(self, rule: ColumnCombination, span: Span) -> tuple[NDArray[np.float64], Counts]:
        base, terms, rescales, kept = self._terms(rule.vectors, span)
        merged = np.zeros((span[1] // self._piece.row_length, self._piece.row_length))
        for weights, rescale, term in zip(rule.weights, rescales, terms, strict=True):
            merged += (weights * rescale) * term.reshape(merged.shape).astype(np.float64)
        if base is not None:
            merged = base.reshape(merged.shape).astype(np.float64) + merged
        return merged.ravel(), kept


def _rescales(vectors: Sequence[TaskVector]) -> NDArray[np.float64]:
    return np.array([vector.rescale for vector in vectors], np.float64)
