"""One piece of every model in memory, and what can be asked of it: statistics and the merge.

Two implementations with the same bits: compiled kernels on the CPU (fp32 and narrower), and the
rules' own torch formulas (fp64 inputs, users' formulas, a GPU).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Applied, Bins, Block, Counts, Operand, operand_bytes
from streammerge.algebra.gram_matrix import full_matrices
from streammerge.algebra.rules import (
    ColumnCombination,
    CopyOf,
    FisherMean,
    RowCombination,
    Rule,
    SelectedMerge,
    TaskVectorMerge,
    TouchedMerge,
    WeightedSum,
    ranked,
    removing,
)
from streammerge.algebra.scores import Score, Selection
from streammerge.algebra.task_vectors import RankDrop, TaskVector
from streammerge.backends.cpu.tiles import Divergences, Slabs
from streammerge.numerics.ordered_sum import BLOCK


class KernelMath:
    """A piece on the CPU through the compiled kernels."""

    def __init__(self, piece: Block) -> None:
        from streammerge.kernels import blocks, deltas, fisher, gram, merge, ranks
        from streammerge.kernels.blocks import CODES

        self._deltas: Any = deltas  # numba erases signatures
        self._merge: Any = merge
        self._fisher: Any = fisher
        self._gram: Any = gram
        self._ranks: Any = ranks
        self._blocks: Any = blocks
        self._divergences: Divergences = {}
        self._codes = CODES
        self._piece = piece
        self._half, self._full = piece.arena.view(np.uint16), piece.arena.view(np.uint32)
        self._offsets, self._dtypes = self._places(piece.models)

    @property
    def _slabs(self) -> Slabs:
        # Not kept: a cycle would hold on to the buffer until the garbage is collected.
        return Slabs(self, self._piece, self._divergences)

    def _places(self, operands: tuple[Operand, ...]) -> tuple[Counts, Counts]:
        """Return the byte offsets and the dtype codes of some operands."""
        offsets = np.array([operand.offset for operand in operands], np.int64)
        return offsets, np.array([self._codes[operand.dtype] for operand in operands], np.int64)

    def _key(self, purpose: str, model: int | None) -> NDArray[np.uint32]:
        return np.array(self._piece.keys.key(purpose, model, self._piece.tensor), np.uint32)

    def _delta_arguments(self, vector: TaskVector) -> tuple[Any, ...]:
        piece = self._piece
        assert piece.base is not None
        model = piece.models[vector.model]
        return (
            self._half,
            self._full,
            model.offset,
            self._codes[model.dtype],
            piece.base.offset,
            self._codes[piece.base.dtype],
        )

    def _drop_key(self, vector: TaskVector) -> NDArray[np.uint32]:
        drops = vector.drop or vector.drop_end
        return self._key("dare", vector.stream) if drops else np.zeros(4, np.uint32)

    @staticmethod
    def _drop(vector: TaskVector) -> Counts:
        return np.array([vector.drop, vector.drop_end], np.int64)

    def _masks(self, vectors: tuple[TaskVector, ...]) -> tuple[Any, ...]:
        """Return the kernels' arguments that say which entries of each task vector survive."""
        return (
            np.stack([self._drop(v) for v in vectors]),
            np.stack([self._drop_key(v) for v in vectors]),
            np.stack([self._cut(v) for v in vectors]),
            np.stack([self._cut_key(v) for v in vectors]),
        )

    def _cut(self, vector: TaskVector) -> Counts:
        """Return (rule, magnitude pattern, limit) of the cut, and the same of the outliers."""
        rules = {
            "drop": self._deltas.ABOVE,
            "all": self._deltas.ALL,
            "thin": self._deltas.THIN,
            "index": self._deltas.INDEX,
        }
        cut = np.tile(np.array([self._deltas.NO_CUT, 0, 0], np.int64), 2)
        for place, one in enumerate((vector.cut, vector.outliers)):
            if one is not None:
                cut[3 * place : 3 * place + 3] = rules[one.ties], one.key, one.limit
        return cut

    def _cut_key(self, vector: TaskVector) -> NDArray[np.uint32]:
        thin = vector.cut is not None and vector.cut.ties == "thin"
        return self._key("ties", vector.stream) if thin else np.zeros(4, np.uint32)

    def count_keys(
        self, vector: TaskVector | Score, low: int, high: int, shift: int, bins: Bins
    ) -> tuple[int, int]:
        """See `BlockMath`."""
        if not isinstance(vector, TaskVector):
            return self._slabs.count_keys(vector, low, high, shift, bins)
        above, highest = self._deltas.keys_in_window(
            *self._delta_arguments(vector),
            self._piece.start,
            self._piece.n,
            self._drop(vector),
            self._drop_key(vector),
            low,
            high,
            shift,
            bins,
        )
        return int(above), int(highest)

    def abs_sums(self, vector: TaskVector) -> NDArray[np.float64]:
        """See `BlockMath`."""
        partials = np.empty(-(-self._piece.n // BLOCK), np.float64)
        if (drop := vector.rank_drop) is not None:
            self._ranks.ranked_abs_sums(
                *self._delta_arguments(vector),
                *self._span,
                self._piece.row_length,
                drop.low,
                drop.spread,
                self._key("della", vector.stream),
                partials,
            )
            return partials
        self._deltas.abs_sums(
            *self._delta_arguments(vector),
            self._piece.start,
            self._piece.n,
            self._drop(vector),
            self._drop_key(vector),
            self._cut(vector),
            self._cut_key(vector),
            partials,
        )
        return partials

    def ties(self, vector: TaskVector | Score, key: int, size: int) -> Counts:
        """See `BlockMath`."""
        if not isinstance(vector, TaskVector):
            return self._slabs.ties(vector, key, size)
        counts = np.zeros(-(-self._piece.n // size), np.int64)
        self._deltas.ties_per_block(
            *self._delta_arguments(vector),
            self._piece.n,
            key,
            self._piece.start,
            self._drop(vector),
            self._drop_key(vector),
            counts,
            size,
        )
        return counts

    def dots(self, vectors: Sequence[TaskVector], length: int) -> NDArray[np.float64]:
        """See `BlockMath`."""
        arguments, k = self._combined(vectors)
        sums = np.empty((-(-self._piece.n // length), k * (k + 1) // 2))
        self._gram.dots(*arguments[:6], *self._span, length, *arguments[6:], sums)
        return sums

    def add_column_dots(self, vectors: Sequence[TaskVector], sums: NDArray[np.float64]) -> None:
        """See `BlockMath`."""
        self._slabs.add_column_dots(vectors, sums)

    def squares(self, vectors: tuple[TaskVector, ...], selection: Selection | None) -> NDArray[np.float64]:
        """See `BlockMath`."""
        return self._slabs.squares(vectors, selection)

    def touches(self, vectors: tuple[TaskVector, ...], epsilon: float) -> Counts:
        """See `BlockMath`."""
        return self._slabs.touches(vectors, epsilon)

    def widened(self, operand: Operand, first: int, n: int) -> NDArray[np.float32]:
        """Return `n` elements from `first` of an input on, in fp32."""
        values = np.empty(n, np.float32)
        at = operand.offset + operand_bytes(operand, first)
        self._blocks.widen(self._half, self._full, at, self._codes[operand.dtype], n, values)
        return values

    def survivors(
        self,
        vectors: tuple[TaskVector, ...],
        first: int,
        base: NDArray[np.float32],
        deltas: NDArray[np.float32],
    ) -> Counts:
        """Write elements from `first` on of the base, and of every surviving task vector; return how many survive."""
        piece = self._piece
        assert piece.base is not None
        kept = np.zeros(len(vectors), np.int64)
        offsets, codes = self._places(tuple(piece.models[vector.model] for vector in vectors))
        widths = np.array([operand_bytes(piece.models[v.model], 1) for v in vectors])
        self._deltas.survivors(
            self._half,
            self._full,
            offsets + first * widths,
            codes,
            piece.base.offset + operand_bytes(piece.base, first),
            self._codes[piece.base.dtype],
            piece.start + first,
            base.size,
            *self._masks(vectors),
            base,
            deltas,
            kept,
        )
        return kept

    def write(self, values: NDArray[np.float64], out: Operand, first: int) -> int:
        """Round `values` into the output from element `first` on; return how many are not finite."""
        at = out.offset + operand_bytes(out, first)
        bad = self._blocks.round_out(values, values.size, self._half, self._full, at, self._codes[out.dtype])
        return int(bad)

    @property
    def _span(self) -> tuple[int, int]:
        return self._piece.start, self._piece.n

    def _combined(self, vectors: Sequence[TaskVector]) -> tuple[list[Any], int]:
        """Return the kernels' arguments for task vectors or, without any, the base and the models; and how many."""
        piece = self._piece
        deltas = len(vectors) > 0
        base = piece.base or Operand(0, "F32")
        front = () if deltas or piece.base is None else (piece.base,)
        operands = (*front, *(piece.models[v.model] for v in vectors)) if deltas else (*front, *piece.models)
        masks = self._masks(tuple(vectors) if deltas else (TaskVector(0),))
        rescales = np.array([v.rescale for v in vectors] if deltas else [1.0], np.float64)
        arguments = [
            self._half,
            self._full,
            *self._places(operands),
            base.offset,
            self._codes[base.dtype],
            deltas,
            *masks,
            rescales,
        ]
        return arguments, len(operands)

    def _weigh_rows(self, rule: RowCombination, out: Operand) -> Applied:
        length = self._piece.row_length
        arguments, k = self._combined(rule.vectors)
        weights = rule.coefficients(full_matrices(self.dots(rule.vectors, length), k))
        kept = np.zeros(k, np.int64)
        bad = self._gram.weigh_rows(
            *arguments[:6],
            *self._span,
            length,
            *arguments[6:],
            np.ascontiguousarray(weights),
            out.offset,
            self._codes[out.dtype],
            kept,
        )
        return Applied(int(bad), tuple(int(n) for n in kept) if removing(rule) else ())

    def sign_total(self, merge: TaskVectorMerge) -> int:
        """See `BlockMath`."""
        signs = np.zeros(1, np.int64)
        self._run_merge(merge, 0, -1, signs)
        return int(signs[0])

    def apply(self, rule: Rule, out: Operand) -> Applied:
        """See `BlockMath`."""
        code = self._codes[out.dtype]
        if isinstance(rule, CopyOf):
            rule = WeightedSum(tuple(float(i == rule.model) for i in range(len(self._piece.models))))
        if isinstance(rule, WeightedSum):
            places, weights = (self._offsets, self._dtypes), rule.weights
            if rule.base_weight and self._piece.base is not None:
                places = self._places((self._piece.base, *self._piece.models))
                weights = (rule.base_weight, *weights)
            bad = self._merge.weighted_sum(
                self._half,
                self._full,
                *places,
                np.array(weights, np.float64),
                float(rule.divisor),
                self._piece.n,
                out.offset,
                code,
            )
            return Applied(int(bad), ())
        if isinstance(rule, RowCombination):
            return self._weigh_rows(rule, out)
        if isinstance(rule, SelectedMerge | TouchedMerge | ColumnCombination):
            return self._slabs.apply(rule, out)
        if isinstance(rule, FisherMean):
            return self._run_fisher(rule, out.offset, code)
        assert isinstance(rule, TaskVectorMerge)
        bad, kept = self._run_merge(rule, out.offset, code, np.zeros(1, np.int64))
        return Applied(bad, kept if removing(rule) else ())

    def fisher_squares(self, model: int) -> tuple[NDArray[np.float64], int]:
        """See `BlockMath`."""
        partials = np.empty(-(-self._piece.n // BLOCK), np.float64)
        fisher = self._piece.fishers[model]
        bad = self._fisher.square_sums(
            self._half, self._full, fisher.offset, self._codes[fisher.dtype], self._piece.n, partials
        )
        return partials, int(bad)

    def _run_fisher(self, rule: FisherMean, out_offset: int, code: int) -> Applied:
        piece = self._piece
        base = piece.base or Operand(0, "F32")
        vectors = rule.vectors or tuple(TaskVector(i) for i in range(len(piece.models)))
        kept = np.zeros(len(vectors), np.int64)
        bad, floored = self._fisher.fisher_mean(
            self._half,
            self._full,
            self._offsets,
            self._dtypes,
            *self._places(piece.fishers),
            base.offset,
            self._codes[base.dtype],
            piece.start,
            piece.n,
            *self._masks(vectors),
            np.array([v.rescale for v in rule.vectors], np.float64),
            np.array(rule.coefficients, np.float64),
            np.array(rule.floors, np.float64),
            rule.add,
            np.array(rule.average, np.float64),
            out_offset,
            code,
            kept,
        )
        return Applied(int(bad), tuple(int(n) for n in kept) if removing(rule) else (), int(floored))

    def _run_merge(
        self, merge: TaskVectorMerge, out_offset: int, code: int, signs: Counts
    ) -> tuple[int, tuple[int, ...]]:
        piece = self._piece
        assert piece.base is not None
        kept = np.zeros(len(merge.vectors), np.int64)
        vectors = merge.vectors
        if ranked(merge):
            drops = [v.rank_drop or RankDrop(1.0, 0.0) for v in vectors]
            bad = self._ranks.ranked_merge(
                self._half,
                self._full,
                self._offsets,
                self._dtypes,
                piece.base.offset,
                self._codes[piece.base.dtype],
                piece.start,
                piece.n,
                piece.row_length,
                np.array([d.low for d in drops], np.float64),
                np.array([d.spread for d in drops], np.float64),
                any(d.unbiased for d in drops),
                np.stack([self._key("della", v.stream) for v in vectors]),
                np.array([v.coefficient for v in vectors], np.float64),
                np.array([v.weight for v in vectors], np.float64),
                merge.elect,
                merge.zero_sign,
                merge.normalize,
                float(merge.divisor),
                float(merge.scale),
                out_offset,
                code,
                kept,
                signs,
            )
            return int(bad), tuple(int(n) for n in kept)
        bad = self._merge.task_vector_merge(
            self._half,
            self._full,
            self._offsets,
            self._dtypes,
            piece.base.offset,
            self._codes[piece.base.dtype],
            piece.start,
            piece.n,
            *self._masks(vectors),
            np.array([v.coefficient for v in vectors], np.float64),
            np.array([v.weight for v in vectors], np.float64),
            merge.elect,
            merge.zero_sign,
            merge.normalize,
            float(merge.divisor),
            float(merge.scale),
            out_offset,
            code,
            kept,
            signs,
        )
        return int(bad), tuple(int(n) for n in kept)
