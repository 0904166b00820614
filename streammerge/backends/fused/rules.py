"""Merge rules by fused kernels. Each is enqueued; what it returns says where its counts lie, and how to read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from streammerge.algebra.block import Applied, Counts, Operand
from streammerge.algebra.rules import (
    ConsensusMerge,
    CopyOf,
    FisherMean,
    LargestAgreeing,
    Rule,
    TaskVectorMerge,
    TouchedMerge,
    WeightedSum,
    ranked,
    removing,
)
from streammerge.backends.fused.memory import LEAD, DeviceMemory, Scratch
from streammerge.backends.fused.specs import kernel_specs
from streammerge.backends.fused.tables import (
    CODES,
    NOTHING,
    bits,
    certainty_rows,
    rank_rows,
    weighted_rows,
)


class Counted(NamedTuple):
    """The counts of an enqueued merge."""

    address: int
    """Where they will lie."""
    n: int
    report: Callable[[Counts], list[Applied]]
    """Function that returns the reports, one for each output."""


Enqueue = Callable[[DeviceMemory, Scratch, Any, Sequence[Operand]], Counted]
_F = TypeVar("_F", bound=Enqueue)
_RULES: dict[type[Rule], Enqueue] = {}


def _fuses(rule: type[Rule]) -> Callable[[_F], _F]:
    def register(function: _F) -> _F:
        _RULES[rule] = function
        return function

    return register


def enqueued(rule: Rule) -> Enqueue | None:
    """Return what enqueues the rules of a class, whose outputs differ in the scale only; None if no kernel does."""
    return _RULES.get(type(rule))


def fused_rule(rule: Rule) -> bool:
    """Return whether fused kernels apply a rule."""
    return type(rule) in _RULES and not (type(rule) in _VOTES and ranked(rule))


# --- weighted sums


@_fuses(WeightedSum)
def _weigh(
    memory: DeviceMemory, scratch: Scratch, rules: Sequence[WeightedSum], outs: Sequence[Operand]
) -> Counted:
    (rule,), (out,), block = rules, outs, memory.block
    weights = list(zip(block.models, rule.weights, strict=True))
    if rule.base_weight and block.base is not None:
        weights.insert(0, (block.base, rule.base_weight))
    terms = [(memory.residence.address(operand), operand.dtype, weight) for operand, weight in weights]
    counts, target = scratch.zeros(8), memory.residence.output(out)
    table = scratch.sent(weighted_rows(terms))
    code, divisor = CODES[out.dtype], bits(rule.divisor)
    memory.over_elements("weighted_sum", table, len(terms), divisor, block.n, target, code, counts)
    memory.residence.written(out)
    return Counted(counts, 1, lambda found: [Applied(int(found[0]), ())])


@_fuses(CopyOf)
def _copy(
    memory: DeviceMemory, scratch: Scratch, rules: Sequence[CopyOf], outs: Sequence[Operand]
) -> Counted:
    weights = tuple(float(i == rules[0].model) for i in range(len(memory.block.models)))
    return _weigh(memory, scratch, [WeightedSum(weights)], outs)


# --- task vectors


@_fuses(TaskVectorMerge)
def _merge(
    memory: DeviceMemory, scratch: Scratch, rules: Sequence[TaskVectorMerge], outs: Sequence[Operand]
) -> Counted:
    places = [memory.residence.output(out) for out in outs]
    counts = enqueue_merge(memory, scratch, rules, places, CODES[outs[0].dtype])
    for out in outs:
        memory.residence.written(out)
    k = len(rules[0].vectors)

    def report(found: Counts) -> list[Applied]:
        kept = tuple(int(n) for n in found[1 : 1 + k]) if removing(rules[0]) else ()
        return [Applied(int(bad), kept) for bad in found[1 + k :]]

    return Counted(counts, 1 + k + len(outs), report)


def enqueue_merge(
    memory: DeviceMemory, scratch: Scratch, rules: Sequence[TaskVectorMerge], places: Sequence[int], code: int
) -> int:
    """Merge task vectors into outputs of one dtype, one for each rule; return the address of the counts.

    The counts are the elected signs, the survivors of each vector, and what is not finite in each output.
    """
    rule, vectors = rules[0], rules[0].vectors
    counts = scratch.zeros(8 * (1 + len(vectors) + len(rules)))
    table = scratch.sent(memory.rows(vectors))
    left = enqueue_ranks(memory, scratch, rule, table, counts + 8) if ranked(rule) else 0
    scales = scratch.sent(np.array([one.scale for one in rules], np.float64))
    outs = scratch.sent(np.array(places or [0], np.int64))
    how = (rule.zero_sign, int(rule.normalize), bits(rule.divisor), scales, outs, len(places), code)
    name = ("ranked_vectors" if ranked(rule) else "task_vectors") + ("_elect" if rule.elect else "")
    memory.over_elements(name, table, len(vectors), *memory.base(), *how, counts, left)
    return counts


def enqueue_ranks(
    memory: DeviceMemory,
    scratch: Scratch,
    rule: TaskVectorMerge,
    table: int,
    counts: int,
    *,
    divided: bool = True,
) -> int:
    """Write the entries that survive drops by rank, and count them; return their address, fp64 (k, n)."""
    block, k = memory.block, len(rule.vectors)
    drops = scratch.sent(rank_rows([v.rank_drop for v in rule.vectors], divided=divided))
    left = scratch.empty(8 * k * block.n)
    length, reach = block.row_length, 1 << max(0, block.row_length.bit_length() - 1)
    spread = any(v.rank_drop is not None and v.rank_drop.spread for v in rule.vectors)
    keys = _sorted_rows(memory, scratch, k, table) if spread and length > 1 else 0  # else no rank matters
    grid = (block.n // length * kernel_specs()["ranked"].programs(length + LEAD), k)
    memory.launch("ranked", grid, table, drops, *memory.base(), length, keys, reach, left, counts)
    return left


def _sorted_rows(memory: DeviceMemory, scratch: Scratch, k: int, table: int) -> int:
    """Sort the magnitudes of each row of `k` task vectors; return the address of their patterns, int32 (k, n)."""
    block = memory.block
    length, rows = block.row_length, block.n // block.row_length
    keys, spare = (scratch.empty(4 * k * block.n) for _ in range(2))
    address, code, _, n = memory.base()
    run, merging = kernel_specs()["sort_runs"].elements, kernel_specs()["merge_runs"]
    grid = (rows * kernel_specs()["sort_runs"].programs(length), k)
    memory.launch("sort_runs", grid, table, address, code, n, length, keys)
    while run < length:
        grid = (rows * merging.programs(length), k)
        memory.launch("merge_runs", grid, keys, n, length, run, spare)
        keys, spare, run = spare, keys, 2 * run
    return keys


def signs_of(memory: DeviceMemory, rule: TaskVectorMerge) -> int:
    """Return the number of elements that elect + minus the number that elect -."""
    with memory.scratch() as scratch:
        counts = enqueue_merge(memory, scratch, [rule], [], NOTHING)
        return int(memory.fetch(counts, 1)[0])


# --- votes

_VOTES: tuple[type[Rule], ...] = (ConsensusMerge, LargestAgreeing, TouchedMerge)
"""Rules whose kernels do not read what drops by rank left."""


@_fuses(ConsensusMerge)
def _agree(
    memory: DeviceMemory, scratch: Scratch, rules: Sequence[ConsensusMerge], outs: Sequence[Operand]
) -> Counted:
    return _vote(memory, scratch, rules, outs, "consensus", rules[0].k, rules[0].threshold)


@_fuses(LargestAgreeing)
def _elect(
    memory: DeviceMemory, scratch: Scratch, rules: Sequence[LargestAgreeing], outs: Sequence[Operand]
) -> Counted:
    return _vote(memory, scratch, rules, outs, "largest_agreeing", 0, 0.0)


def _vote(
    memory: DeviceMemory,
    scratch: Scratch,
    rules: Sequence[ConsensusMerge | LargestAgreeing],
    outs: Sequence[Operand],
    name: str,
    least: int,
    threshold: float,
) -> Counted:
    (rule,), (out,), k = rules, outs, len(rules[0].vectors)
    table, counts = scratch.sent(memory.rows(rule.vectors)), scratch.zeros(8 * (1 + k))
    how = (least, bits(threshold), bits(rule.scale))
    target, code = memory.residence.output(out), CODES[out.dtype]
    memory.over_elements(name, table, k, *memory.base(), *how, target, code, counts)
    memory.residence.written(out)
    return _with_survivors(rule, k, counts)


@_fuses(TouchedMerge)
def _touch(
    memory: DeviceMemory, scratch: Scratch, rules: Sequence[TouchedMerge], outs: Sequence[Operand]
) -> Counted:
    (rule,), (out,), k = rules, outs, len(rules[0].vectors)
    table, counts = scratch.sent(memory.rows(rule.vectors)), scratch.zeros(8 * (1 + k))
    factors = scratch.sent(np.array(rule.factors, np.float64))
    target, code = memory.residence.output(out), CODES[out.dtype]
    how = (bits(rule.epsilon), target, code, counts)
    memory.over_elements("touched_merge", table, factors, k, *memory.base(), *how)
    memory.residence.written(out)
    return _with_survivors(rule, k, counts)


def _with_survivors(rule: Rule, k: int, counts: int) -> Counted:
    """Return counts of what is not finite, and of the survivors of each of `k` vectors."""

    def report(found: Counts) -> list[Applied]:
        kept = tuple(int(n) for n in found[1:]) if removing(rule) else ()
        return [Applied(int(found[0]), kept)]

    return Counted(counts, 1 + k, report)


# --- Fisher


@_fuses(FisherMean)
def _fisher(
    memory: DeviceMemory, scratch: Scratch, rules: Sequence[FisherMean], outs: Sequence[Operand]
) -> Counted:
    (rule,), (out,), block = rules, outs, memory.block
    k, vectors = len(block.models), rule.vectors
    models = [(memory.residence.address(operand), operand.dtype, 0.0) for operand in block.models]
    table = scratch.sent(memory.rows(vectors) if vectors else weighted_rows(models))
    fishers = [(memory.residence.address(operand), operand) for operand in block.fishers]
    certain = scratch.sent(certainty_rows(fishers, rule.coefficients, rule.floors, rule.average))
    shares = 0.0
    for share in rule.average:
        shares += share
    counts, target = scratch.zeros(8 * (2 + k)), memory.residence.output(out)
    how = (int(rule.add), bits(shares), target, CODES[out.dtype], counts)
    name = "fisher_mean_vectors" if vectors else "fisher_mean"
    memory.over_elements(name, table, certain, k, *memory.base(), *how)
    memory.residence.written(out)

    def report(found: Counts) -> list[Applied]:
        kept = tuple(int(n) for n in found[2:]) if removing(rule) else ()
        return [Applied(int(found[0]), kept, int(found[1]))]

    return Counted(counts, 2 + k, report)
