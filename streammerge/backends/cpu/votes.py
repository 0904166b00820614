"""Merges in which the models vote on each element, on tiles."""

from __future__ import annotations

import numpy as np

from streammerge.algebra.block import Applied, BlockMath, Counts, Operand
from streammerge.algebra.competition import Competition, Size
from streammerge.algebra.rules import BalancedMerge, ConsensusMerge, LargestAgreeing
from streammerge.backends.cpu.memory import BlockMemory, kernels
from streammerge.backends.cpu.registry import OUT, VECTORS, applies, example
from streammerge.backends.cpu.tiles import Span, Tile, Tiles, coefficients, written


@applies(ConsensusMerge, kernels="votes")
def _agree(memory: BlockMemory, rule: ConsensusMerge, out: Operand) -> Applied:
    return _voted(memory, rule, out, "consensus_merge", (int(rule.k), float(rule.threshold)))


@applies(LargestAgreeing, kernels="votes")
def _elect(memory: BlockMemory, rule: LargestAgreeing, out: Operand) -> Applied:
    return _voted(memory, rule, out, "largest_agreeing", ())


def _voted(
    memory: BlockMemory,
    rule: ConsensusMerge | LargestAgreeing,
    out: Operand,
    name: str,
    told: tuple[int, float] | tuple[()],
) -> Applied:
    factors, loop = coefficients(rule.vectors), getattr(kernels().votes, name)

    def merge(tiles: Tiles, span: Span) -> tuple[Tile, Counts]:
        base, deltas, kept = tiles.survivors(rule.vectors, span)
        merged = np.empty(span[1])
        loop(base, deltas, factors, *told, float(rule.scale), merged)
        return merged, kept

    return written(memory, rule, out, merge)


@applies(BalancedMerge, kernels="competition")
def _balance(memory: BlockMemory, rule: BalancedMerge, out: Operand) -> Applied:
    factors, ranges = coefficients(rule.vectors), np.array(rule.ranges, np.float64)
    winners = np.array(rule.scores, np.float64)

    def merge(tiles: Tiles, span: Span) -> tuple[Tile, Counts]:
        base, deltas, kept = tiles.survivors(rule.vectors, span)
        merged = np.empty(span[1])
        loop = kernels().competition.balanced_merge
        loop(base, deltas, factors, ranges, winners, float(rule.scale), merged)
        return merged, kept

    return written(memory, rule, out, merge)


@example("votes")
def _votes(math: BlockMath) -> None:
    math.apply(ConsensusMerge(VECTORS, 2, 0.5), OUT)
    math.apply(LargestAgreeing(VECTORS), OUT)


@example("competition")
def _competes(math: BlockMath) -> None:
    ranges = ((0.0, 1.0), (0.0, 1.0))
    for score in (Size(VECTORS[0]), Competition(VECTORS, ranges, 0)):
        math.count_keys(score, 0, (1 << 31) - 1, 15, np.zeros(1 << 16, np.int32))
    math.apply(BalancedMerge(VECTORS, ranges, ranges), OUT)
