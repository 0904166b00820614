"""Statistics and merges on the CPU that proceed tile by tile.

A tile holds a run of elements of the base, and of every task vector after its drops and cuts, in fp32; it fits in the
cache. One kernel fills a tile. The kernels that work on it are short, and do not deal with dtypes, masks or offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Applied, BlockMath, Counts, Operand
from streammerge.algebra.competition import Competition, Size
from streammerge.algebra.gram_matrix import rows_at_once
from streammerge.algebra.rules import ColumnCombination, Rule, SelectedMerge, TouchedMerge, vectors_of
from streammerge.algebra.scores import Importance, Score, Selection, Spread
from streammerge.algebra.task_vectors import TaskVector
from streammerge.backends.cpu.memory import BlockMemory, kernels
from streammerge.backends.cpu.registry import OUT, VECTORS, Names, applies, example
from streammerge.backends.cpu.rules import applied
from streammerge.numerics.ordered_sum import BLOCK

_TILE = 1 << 15
"""Most elements of a tile; a multiple of 4096."""
_TILE_BYTES = 1 << 20
"""Most bytes of a tile's base and task vectors; with many models a tile has fewer elements."""

Tile = NDArray[np.float64]
Span = tuple[int, int]
"""The first element of a tile, relative to the block, and the number of elements."""


class Tiles:
    """The methods of `BlockMath` whose kernels work on tiles.

    Parameters
    ----------
    memory
        Fills the tiles and writes the results.
    """

    def __init__(self, memory: BlockMemory) -> None:
        self._kernels = kernels().scores
        self._memory = memory
        self.block = memory.block
        self._buffers: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}

    def spans(self, unit: int = 1) -> Iterator[Span]:
        """Yield tiles of a multiple of `unit` elements, at least one unit."""
        fitting = _TILE_BYTES // (4 * (len(self.block.models) + 1)) // BLOCK * BLOCK
        size = max(unit, max(BLOCK, min(_TILE, fitting)) // unit * unit)
        for first in range(0, self.block.n, size):
            yield first, min(size, self.block.n - first)

    def survivors(
        self, vectors: Sequence[TaskVector], span: Span
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], Counts]:
        """Return a tile: the base, (n,), the task vectors, (vectors, n), and the number of survivors of each.

        The next tile overwrites it.
        """
        first, n = span
        k = len(vectors)
        if k not in self._buffers or self._buffers[k][0].size < n:
            self._buffers[k] = np.empty(n, np.float32), np.empty(k * n, np.float32)
        base, deltas = self._buffers[k][0][:n], self._buffers[k][1][: k * n].reshape(k, n)
        return base, deltas, self._memory.survivors(vectors, first, base, deltas)

    def terms(
        self, vectors: Sequence[TaskVector], span: Span
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float32], NDArray[np.float64], Counts]:
        """Return the base, the task vectors, their factors, and the numbers of survivors.

        Without task vectors, return None for the base, and the base (if any) and the models as vectors.
        """
        if vectors:
            base, deltas, kept = self.survivors(vectors, span)
            return base, deltas, rescales(vectors), kept
        block = self.block
        operands = (*(() if block.base is None else (block.base,)), *block.models)
        models = np.stack([self._memory.widened(operand, *span) for operand in operands])
        return None, models, np.ones(len(operands)), np.zeros(len(operands), np.int64)

    # --- scores

    def patterns(self, score: Score, span: Span) -> NDArray[np.uint32]:
        """Return the fp32 patterns of a score, (n,)."""
        patterns = np.empty(span[1], np.uint32)
        SCORES[type(score)][1](self, score, span, patterns)
        return patterns

    def divergence(self, score: Importance) -> NDArray[np.float64]:
        """Return the divergence of each row, (rows,); it is computed once, before the first tile is overwritten."""
        known = self._memory.divergences
        if score not in known:
            vector, length = score.vector, self.block.row_length
            rows = np.empty(self.block.n // length, np.float64)
            for first, n in self.spans(length):
                base, deltas, _ = self.survivors((vector,), (first, n))
                y = base.astype(np.float64).reshape(-1, length)
                x = self._memory.widened(self.block.models[vector.model], first, n).astype(np.float64)
                if vector.removes:
                    x = y.ravel() + vector.rescale * deltas[0].astype(np.float64)
                here = rows[first // length : (first + n) // length]
                self._kernels.divergences(x.reshape(-1, length), y, here)
            known[score] = rows
        return known[score]

    def selected(self, selection: Selection | None, span: Span) -> NDArray[np.bool_]:
        """Return the mask of selected elements, (n,); without a selection, all."""
        if selection is None:
            return np.ones(span[1], np.bool_)
        cut, patterns = selection.cut, self.patterns(selection.score, span)
        kept: NDArray[np.bool_] = patterns >= cut.key if cut.ties == "all" else patterns > cut.key
        if cut.ties == "index":
            before = max(0, cut.limit - self.block.start - span[0])
            kept[:before] |= patterns[:before] == cut.key
        return kept

    # --- sums and counts

    def squares(self, vectors: Sequence[TaskVector], selection: Selection | None) -> NDArray[np.float64]:
        """Return the sums of squares per 4096 elements, (blocks, vectors)."""
        sums = np.empty((-(-self.block.n // BLOCK), len(vectors)), np.float64)
        for first, n in self.spans():
            chosen = self.selected(selection, (first, n))
            _, deltas, _ = self.survivors(vectors, (first, n))
            blocks = sums[first // BLOCK : -(-(first + n) // BLOCK)]
            self._kernels.square_sums(deltas, rescales(vectors), chosen, blocks)
        return sums

    def touches(self, vectors: Sequence[TaskVector], epsilon: float) -> Counts:
        """Return the numbers of elements that each vector touched alone, and with others, (2, vectors)."""
        counts = np.zeros((2, len(vectors)), np.int64)
        for span in self.spans():
            _, deltas, _ = self.survivors(vectors, span)
            self._kernels.count_touched(deltas, rescales(vectors), float(epsilon), *counts)
        return counts

    def own_squares(self) -> NDArray[np.float64]:
        """Return the sums of squares of the base, if any, and of the models per 4096 elements, (blocks, tensors)."""
        sums = np.empty(
            (-(-self.block.n // BLOCK), len(self.block.models) + (self.block.base is not None)), np.float64
        )
        for first, n in self.spans():
            _, tensors, factors, _ = self.terms((), (first, n))
            blocks = sums[first // BLOCK : -(-(first + n) // BLOCK)]
            self._kernels.square_sums(tensors, factors, self.selected(None, (first, n)), blocks)
        return sums

    def agreements(self, vectors: Sequence[TaskVector]) -> Counts:
        """Return the numbers of elements where two or more vectors are not zero: with one sign, and with both, (2,)."""
        counts = np.zeros(2, np.int64)
        for span in self.spans():
            _, deltas, _ = self.survivors(vectors, span)
            kernels().signs.count_agreements(deltas, counts)
        return counts

    def add_column_dots(self, vectors: Sequence[TaskVector], sums: NDArray[np.float64]) -> None:
        """Add the dot products of all pairs over the rows, a fixed number of rows at a time, to `sums`."""
        columns = self.block.row_length
        part = np.empty_like(sums)
        for first in range(0, self.block.n, rows_at_once(columns) * columns):
            stop = min(self.block.n, first + rows_at_once(columns) * columns)
            part[:] = 0.0
            step = max(columns, _TILE // columns * columns)
            for start in range(first, stop, step):
                _, terms, factors, _ = self.terms(vectors, (start, min(step, stop - start)))
                self._kernels.add_products(terms.reshape(len(terms), -1, columns), factors, part)
            sums += part


def rescales(vectors: Sequence[TaskVector]) -> NDArray[np.float64]:
    """Return the factors of task vectors, (vectors,)."""
    return np.array([vector.rescale for vector in vectors], np.float64)


def coefficients(vectors: Sequence[TaskVector]) -> NDArray[np.float64]:
    """Return the factors with which task vectors enter a sum, (vectors,)."""
    return np.array([vector.coefficient for vector in vectors], np.float64)


# --- scores, each with its kernel


def _spread(tiles: Tiles, score: Spread, span: Span, patterns: NDArray[np.uint32]) -> None:
    _, deltas, _ = tiles.survivors(score.vectors, span)
    kernels().scores.spread_patterns(deltas, rescales(score.vectors), patterns)


def _importance(tiles: Tiles, score: Importance, span: Span, patterns: NDArray[np.uint32]) -> None:
    by_row = tiles.divergence(score)
    _, deltas, _ = tiles.survivors((score.vector,), span)
    kernels().scores.importance_patterns(deltas, by_row, span[0], tiles.block.row_length, patterns)


def _size(tiles: Tiles, score: Size, span: Span, patterns: NDArray[np.uint32]) -> None:
    _, deltas, _ = tiles.survivors((score.vector,), span)
    kernels().competition.size_patterns(deltas, float(score.vector.coefficient), patterns)


def _competition(tiles: Tiles, score: Competition, span: Span, patterns: NDArray[np.uint32]) -> None:
    _, deltas, _ = tiles.survivors(score.vectors, span)
    ranges = np.array(score.ranges, np.float64)
    kernels().competition.competition_patterns(
        deltas, coefficients(score.vectors), ranges, score.place, patterns
    )


SCORES: dict[type, tuple[str, Callable[..., None]]] = {
    Spread: ("spread", _spread),
    Importance: ("importance", _importance),
    Size: ("competition", _size),
    Competition: ("competition", _competition),
}
"""The group of kernels and the function that writes the patterns of each kind of score."""


def kernels_of_score(score: Score) -> Names:
    """Return the groups of kernels that compute a score's patterns."""
    return frozenset({SCORES[type(score)][0]})


def kernels_of_selection(selection: Selection | None) -> Names:
    """Return the groups of kernels that sum over selected elements."""
    return frozenset({"selected"}) | (frozenset() if selection is None else kernels_of_score(selection.score))


@example("spread")
def _spreads(math: BlockMath) -> None:
    math.count_keys(Spread(VECTORS), 0, (1 << 31) - 1, 15, np.zeros(1 << 16, np.int32))


@example("importance")
def _importances(math: BlockMath) -> None:
    math.count_keys(Importance(VECTORS[0]), 0, (1 << 31) - 1, 15, np.zeros(1 << 16, np.int32))


# --- merges: each returns the values of a tile, fp64 (n,), and the numbers of survivors


def written(
    memory: BlockMemory,
    rule: Rule,
    out: Operand,
    merge: Callable[[Tiles, Span], tuple[NDArray[np.float64], Counts]],
    unit: int = 1,
) -> Applied:
    """Write a block tile after tile; the output may overlay an input."""
    tiles = Tiles(memory)
    bad, kept = 0, np.zeros(len(vectors_of(rule)), np.int64)
    for span in tiles.spans(unit):
        values, survived = merge(tiles, span)
        bad += memory.write(values, out, span[0])
        kept += survived[: kept.size]
    return applied(rule, bad, kept)


@applies(SelectedMerge, kernels=lambda rule: kernels_of_selection(rule.selection))
def _select(memory: BlockMemory, rule: SelectedMerge, out: Operand) -> Applied:
    weights = np.array([v.weight for v in rule.vectors], np.float64)

    def merge(tiles: Tiles, span: Span) -> tuple[NDArray[np.float64], Counts]:
        chosen = tiles.selected(rule.selection, span)
        base, deltas, kept = tiles.survivors(rule.vectors, span)
        merged = np.empty(span[1])
        kernels().scores.selected_merge(
            base,
            deltas,
            rescales(rule.vectors),
            weights,
            rule.zero_sign,
            float(rule.floor),
            chosen,
            merged,
        )
        if rule.selection is not None:
            kept[:] = np.count_nonzero(chosen)
        return merged, kept

    return written(memory, rule, out, merge)


@example("selected")
def _selected(math: BlockMath) -> None:
    math.squares(VECTORS, None)
    math.apply(SelectedMerge(VECTORS, None), OUT)


@example("selected")
def _own_squares(math: BlockMath) -> None:
    math.own_squares()


@example("agreements")
def _agreements(math: BlockMath) -> None:
    math.agreements(VECTORS)


@applies(TouchedMerge, kernels="touched")
def _touch(memory: BlockMemory, rule: TouchedMerge, out: Operand) -> Applied:
    factors = np.array(rule.factors, np.float64)

    def merge(tiles: Tiles, span: Span) -> tuple[NDArray[np.float64], Counts]:
        base, deltas, kept = tiles.survivors(rule.vectors, span)
        merged = np.empty(span[1])
        kernels().scores.touched_merge(
            base, deltas, rescales(rule.vectors), float(rule.epsilon), factors, merged
        )
        return merged, kept

    return written(memory, rule, out, merge)


@example("touched")
def _touched(math: BlockMath) -> None:
    math.touches(VECTORS, 0.0)
    math.apply(TouchedMerge(VECTORS, 0.0, (1.0, 1.0)), OUT)


@applies(ColumnCombination, kernels="columns")
def _combine_columns(memory: BlockMemory, rule: ColumnCombination, out: Operand) -> Applied:
    length = memory.block.row_length

    def merge(tiles: Tiles, span: Span) -> tuple[NDArray[np.float64], Counts]:
        base, terms, factors, kept = tiles.terms(rule.vectors, span)
        merged = np.zeros((span[1] // length, length))
        for weights, factor, term in zip(rule.weights, factors, terms, strict=True):
            merged += (weights * factor) * term.reshape(merged.shape).astype(np.float64)
        if base is not None:
            merged = base.reshape(merged.shape).astype(np.float64) + merged
        return merged.ravel(), kept

    return written(memory, rule, out, merge, length)


@example("columns")
def _columns(math: BlockMath) -> None:
    math.add_column_dots(VECTORS, np.zeros((3, 8)))
    math.apply(ColumnCombination(np.ones((2, 8)), VECTORS), OUT)
