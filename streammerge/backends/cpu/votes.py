"""Merges in which the models vote on each element, by numpy on tiles: the formulas of the rules, with the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Applied, BlockMath, Counts, Operand
from streammerge.algebra.rules import ConsensusMerge, LargestAgreeing
from streammerge.algebra.task_vectors import TaskVector
from streammerge.backends.cpu.memory import BlockMemory
from streammerge.backends.cpu.registry import OUT, VECTORS, applies, example
from streammerge.backends.cpu.tiles import Span, Tiles, written

Tile = NDArray[np.float64]


@applies(ConsensusMerge, kernels="votes")
def _agree(memory: BlockMemory, rule: ConsensusMerge, out: Operand) -> Applied:
    return _voted(memory, rule, out, lambda entries: rule.agreed(entries, np))


@applies(LargestAgreeing, kernels="votes")
def _elect(memory: BlockMemory, rule: LargestAgreeing, out: Operand) -> Applied:
    return _voted(memory, rule, out, lambda entries: rule.elected(entries, np))


def _voted(
    memory: BlockMemory,
    rule: ConsensusMerge | LargestAgreeing,
    out: Operand,
    vote: Callable[[Sequence[Tile]], Any],
) -> Applied:
    """Write base + scale * the result of `vote` on the task vectors of each tile."""

    def merge(tiles: Tiles, span: Span) -> tuple[Tile, Counts]:
        base, entries, kept = entries_of(tiles, rule.vectors, span)
        with np.errstate(invalid="ignore", over="ignore"):  # non-finite values are found in the output
            return base + rule.scale * vote(entries), kept

    return written(memory, rule, out, merge)


def entries_of(tiles: Tiles, vectors: Sequence[TaskVector], span: Span) -> tuple[Tile, list[Tile], Counts]:
    """Return a tile of the base and of each task vector as it enters a sum, fp64, and the numbers of survivors."""
    base, deltas, kept = tiles.survivors(vectors, span)
    pairs = zip(vectors, deltas, strict=True)
    return base.astype(np.float64), [v.coefficient * d.astype(np.float64) for v, d in pairs], kept


@example("votes")
def _votes(math: BlockMath) -> None:
    math.apply(LargestAgreeing(VECTORS), OUT)
