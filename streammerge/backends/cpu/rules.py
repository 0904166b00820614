"""Merge rules that a single kernel applies to a whole block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Applied, BlockMath, Counts, Operand
from streammerge.algebra.gram_matrix import full_matrices
from streammerge.algebra.rules import (
    CopyOf,
    FisherMean,
    RowCombination,
    Rule,
    TaskVectorMerge,
    WeightedSum,
    ranked,
    removing,
)
from streammerge.algebra.task_vectors import TaskVector
from streammerge.backends.cpu.memory import BlockMemory, kernels
from streammerge.backends.cpu.registry import OUT, RANKED, VECTORS, Names, applies, example, scales
from streammerge.numerics.ordered_sum import BLOCK


def applied(rule: Rule, bad: int, kept: Counts, floored: int = 0) -> Applied:
    """Return the report of a merge; survivors are counted if the rule may remove entries."""
    return Applied(int(bad), tuple(int(n) for n in kept) if removing(rule) else (), int(floored))


# --- weighted sums


@applies(WeightedSum, kernels="weighted_sum")
def _weigh(memory: BlockMemory, rule: WeightedSum, out: Operand) -> Applied:
    block = memory.block
    with_base = bool(rule.base_weight) and block.base is not None
    base = [block.base] if with_base and block.base is not None else []
    weights = np.array([*([rule.base_weight] if with_base else []), *rule.weights], np.float64)
    bad = kernels().merge.weighted_sum(
        memory.operands([*base, *block.models]), weights, float(rule.divisor), block.n, memory.operand(out)
    )
    return Applied(int(bad), ())


@applies(CopyOf, kernels="weighted_sum")
def _copy(memory: BlockMemory, rule: CopyOf, out: Operand) -> Applied:
    weights = tuple(float(i == rule.model) for i in range(len(memory.block.models)))
    return _weigh(memory, WeightedSum(weights), out)


@example("weighted_sum")
def _sum(math: BlockMath) -> None:
    math.apply(WeightedSum((1.0, 1.0)), OUT)


# --- task vectors


def kernels_of_merge(rule: TaskVectorMerge) -> Names:
    """Return the groups that a merge of task vectors calls."""
    return frozenset({"ranked" if ranked(rule) else "task_vectors"})


@applies(TaskVectorMerge, kernels=kernels_of_merge)
def _merge(memory: BlockMemory, rule: TaskVectorMerge, out: Operand) -> Applied:
    bad, tally = run_merge(memory, rule, memory.operand(out))
    return applied(rule, bad, tally.kept)


@scales(TaskVectorMerge)
def _scale(memory: BlockMemory, rules: Sequence[TaskVectorMerge], outs: Sequence[Operand]) -> list[Applied]:
    others = kernels().operands.Others(
        np.array([rule.scale for rule in rules[1:]], np.float64),
        np.array([out.offset for out in outs[1:]], np.int64),
        np.zeros(len(outs) - 1, np.int64),
    )
    bad, tally = run_merge(memory, rules[0], memory.operand(outs[0]), others)
    counts = [bad, *others.bad]
    return [applied(rule, one, tally.kept) for rule, one in zip(rules, counts, strict=True)]


def run_merge(memory: BlockMemory, rule: TaskVectorMerge, out: Any, others: Any = None) -> tuple[int, Any]:
    """Merge task vectors; return the number of non-finite results, and the tally of survivors and elected signs.

    `others` are further outputs of a rule whose vectors have no drop by rank.
    """
    loops, vectors = kernels(), rule.vectors
    how = loops.operands.Combination(
        np.array([v.coefficient for v in vectors], np.float64),
        np.array([v.weight for v in vectors], np.float64),
        bool(rule.elect),
        int(rule.zero_sign),
        bool(rule.normalize),
        float(rule.divisor),
        float(rule.scale),
    )
    tally = loops.operands.Tally(np.zeros(len(vectors), np.int64), np.zeros(1, np.int64))
    assert memory.block.base is not None
    models, base = memory.operands(memory.block.models), memory.operand(memory.block.base)
    if ranked(rule):
        length, drops = memory.block.row_length, memory.rank_drops(vectors)
        bad = loops.ranks.ranked_merge(models, base, memory.span(), length, drops, how, out, tally)
    else:
        masks = memory.masks(vectors)
        others = others or loops.operands.Others(np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))
        bad = loops.merge.task_vector_merge(models, base, memory.span(), masks, how, out, tally, others)
    return int(bad), tally


@example("task_vectors")
def _elected(math: BlockMath) -> None:
    math.apply(TaskVectorMerge(VECTORS, elect=True), OUT)


@example("ranked")
def _ranked(math: BlockMath) -> None:
    math.abs_sums(RANKED[0])
    math.apply(TaskVectorMerge(RANKED, elect=True), OUT)


# --- sums whose weights differ from row to row


@applies(RowCombination, kernels=lambda rule: frozenset({"dots", "rows"}))
def _combine_rows(memory: BlockMemory, rule: RowCombination, out: Operand) -> Applied:
    length = memory.block.row_length
    operands, k = memory.vectors(rule.vectors)
    weights = np.ascontiguousarray(
        rule.coefficients(full_matrices(dot_products(memory, rule.vectors, length), k))
    )
    kept = np.zeros(k, np.int64)
    bad = kernels().gram.weigh_rows(
        operands,
        memory.operand(memory.block.base),
        memory.span(),
        length,
        memory.terms(rule.vectors),
        weights,
        memory.operand(out),
        kept,
    )
    return applied(rule, bad, kept)


def dot_products(memory: BlockMemory, vectors: Sequence[TaskVector], length: int) -> NDArray[np.float64]:
    """Return the dot products of all pairs over every `length` elements, (groups, pairs); see `BlockMath.dots`."""
    operands, k = memory.vectors(vectors)
    sums = np.empty((-(-memory.block.n // length), k * (k + 1) // 2))
    base = memory.operand(memory.block.base)
    kernels().gram.dots(operands, base, memory.span(), length, memory.terms(vectors), sums)
    return sums


@example("dots")
def _dots(math: BlockMath) -> None:
    math.dots(VECTORS, BLOCK)


@example("rows")
def _rows(math: BlockMath) -> None:
    math.apply(RowCombination(lambda gram: gram[:, 0], VECTORS), OUT)


# --- Fisher


@applies(FisherMean, kernels="fisher")
def _fisher(memory: BlockMemory, rule: FisherMean, out: Operand) -> Applied:
    block, loops = memory.block, kernels()
    how = loops.operands.Certainty(
        np.array(rule.coefficients, np.float64),
        np.array(rule.floors, np.float64),
        bool(rule.add),
        np.array(rule.average, np.float64),
    )
    kept = np.zeros(len(block.models), np.int64)
    bad, floored = loops.fisher.fisher_mean(
        memory.operands(block.models),
        memory.operands(block.fishers),
        memory.operand(block.base),
        memory.span(),
        memory.terms(rule.vectors),
        how,
        memory.operand(out),
        kept,
    )
    return applied(rule, bad, kept, floored)


@example("fisher")
def _fisher_mean(math: BlockMath) -> None:
    math.fisher_squares(0)
    math.apply(FisherMean((1.0, 1.0), (0.0, 0.0), vectors=VECTORS), OUT)
