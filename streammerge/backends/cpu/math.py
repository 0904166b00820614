"""`BlockMath` by compiled kernels: fp32 and narrower dtypes, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Applied, Bins, Block, BlockMath, Counts, Operand
from streammerge.algebra.rules import Rule, TaskVectorMerge
from streammerge.algebra.scores import Ranked, Selection
from streammerge.algebra.task_vectors import TaskVector
from streammerge.backends.cpu import votes  # noqa: F401  (registers its rules)
from streammerge.backends.cpu.memory import BlockMemory, kernels
from streammerge.backends.cpu.ranking import kernels_of_ranking, ranking_of
from streammerge.backends.cpu.registry import (
    VECTORS,
    Names,
    answers,
    example,
    implementation_of,
    scaled_implementation_of,
)
from streammerge.backends.cpu.rules import dot_products, kernels_of_merge, run_merge
from streammerge.backends.cpu.settling import Settling
from streammerge.backends.cpu.tiles import Tiles, kernels_of_selection
from streammerge.numerics.ordered_sum import BLOCK


def _kernels_of_sum(vector: TaskVector) -> Names:
    return frozenset({"ranked" if vector.rank_drop else "abs_sums"})


class KernelMath(Settling):
    """`BlockMath` by compiled kernels; see there for what the methods return."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._memory = BlockMemory(block)

    @property
    def _tiles(self) -> Tiles:
        return Tiles(self._memory)  # not cached: its buffers are as large as a few tiles

    @answers(kernels_of_ranking)
    def count_keys(self, subject: Ranked, low: int, high: int, shift: int, bins: Bins) -> tuple[int, int]:
        """See `BlockMath`."""
        window = kernels().operands.Window(low, high, shift)
        return ranking_of(subject).count_keys(self._memory, subject, window, bins)

    @answers(_kernels_of_sum)
    def abs_sums(self, vector: TaskVector) -> NDArray[np.float64]:
        """See `BlockMath`."""
        memory = self._memory
        partials = np.empty(-(-self._block.n // BLOCK), np.float64)
        if vector.rank_drop is not None:
            drop = memory.rank_drops((vector,), divided=False)
            kernels().ranks.ranked_abs_sums(
                *memory.pair(vector), memory.span(), self._block.row_length, drop, partials
            )
            return partials
        kernels().magnitudes.abs_sums(*memory.pair(vector), memory.span(), memory.masks((vector,)), partials)
        return partials

    @answers(kernels_of_ranking)
    def ties(self, subject: Ranked, key: int, size: int) -> Counts:
        """See `BlockMath`."""
        return ranking_of(subject).ties(self._memory, subject, key, size)

    @answers("dots")
    def dots(self, vectors: Sequence[TaskVector], length: int) -> NDArray[np.float64]:
        """See `BlockMath`."""
        return dot_products(self._memory, vectors, length)

    @answers("columns")
    def add_column_dots(self, vectors: Sequence[TaskVector], sums: NDArray[np.float64]) -> None:
        """See `BlockMath`."""
        self._tiles.add_column_dots(vectors, sums)

    @answers(kernels_of_selection)
    def squares(self, vectors: tuple[TaskVector, ...], selection: Selection | None) -> NDArray[np.float64]:
        """See `BlockMath`."""
        return self._tiles.squares(vectors, selection)

    @answers("touched")
    def touches(self, vectors: tuple[TaskVector, ...], epsilon: float) -> Counts:
        """See `BlockMath`."""
        return self._tiles.touches(vectors, epsilon)

    @answers("selected")
    def own_squares(self) -> NDArray[np.float64]:
        """See `BlockMath`."""
        return self._tiles.own_squares()

    @answers("agreements")
    def agreements(self, vectors: tuple[TaskVector, ...]) -> Counts:
        """See `BlockMath`."""
        return self._tiles.agreements(vectors)

    @answers(kernels_of_merge)
    def sign_total(self, merge: TaskVectorMerge) -> int:
        """See `BlockMath`."""
        _, tally = run_merge(self._memory, merge, self._memory.operand(None, written=False))
        return int(tally.signs[0])

    @answers("fisher")
    def fisher_squares(self, model: int) -> tuple[NDArray[np.float64], int]:
        """See `BlockMath`."""
        partials = np.empty(-(-self._block.n // BLOCK), np.float64)
        diagonal = self._memory.operand(self._block.fishers[model])
        return partials, int(kernels().fisher.square_sums(diagonal, self._block.n, partials))

    def apply_scaled(self, rules: Sequence[Rule], outs: Sequence[Operand]) -> list[Applied]:
        """See `ScalingMath`."""
        return scaled_implementation_of(rules[0])(self._memory, rules, outs)

    def apply(self, rule: Rule, out: Operand) -> Applied:
        """See `BlockMath`."""
        found = implementation_of(rule)
        assert found is not None, f"no kernel applies {type(rule).__name__}"
        return found.apply(self._memory, rule, out)


@example("abs_sums")
def _abs_sums(math: BlockMath) -> None:
    math.abs_sums(VECTORS[0])
