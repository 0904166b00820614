"""Finds the groups of kernels that a plan will call, before a byte is read, so that no others are compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from streammerge.algebra.rules import (
    ColumnCombination,
    CopyOf,
    FisherMean,
    RowCombination,
    SelectedMerge,
    TaskVectorMerge,
    TouchedMerge,
    WeightedSum,
)
from streammerge.backends.cpu.groups import groups_of_call, groups_of_merge, groups_of_selection
from streammerge.planning.job import Job
from streammerge.planning.memory.buffers import is_copied
from streammerge.planning.needs import likeness, tensor_context_of
from streammerge.planning.plan import MergePlan

Names = frozenset[str]
_OF_RULE: Mapping[type, Callable[[Any], Names]] = {
    WeightedSum: lambda rule: frozenset({"weighted_sum"}),
    CopyOf: lambda rule: frozenset({"weighted_sum"}),
    TaskVectorMerge: groups_of_merge,
    SelectedMerge: lambda rule: groups_of_selection(rule.selection),
    TouchedMerge: lambda rule: frozenset({"touched"}),
    FisherMean: lambda rule: frozenset({"fisher"}),
    RowCombination: lambda rule: frozenset({"dots", "rows"}),
    ColumnCombination: lambda rule: frozenset({"columns"}),
}
"""Groups by the class of a rule; classes that are not here need none."""
_BESIDE_TORCH = frozenset({"words", "adapters"})
"""Groups that serve torch too: random words are counted, and adapters applied, before it sees a value."""


def needed_kernels(plan: MergePlan) -> Names:
    """Return the names of the groups (see `streammerge.backends.cpu.compile`) that serve a merge."""
    names: set[str] = set()
    seen: set[tuple[object, ...]] = set()
    for job in plan.jobs:
        names.update(*(ref.kernels for ref in (*job.inputs, *job.sources)))
        in_torch = not plan.backend_of(job).compiled
        key = (in_torch, bool(job.fishers), *likeness(job, plan.method))
        if not is_copied(job) and key not in seen:
            seen.add(key)
            names |= _of_job(job, plan) & _BESIDE_TORCH if in_torch else _of_job(job, plan)
    return frozenset(names)


def _of_job(job: Job, plan: MergePlan) -> Names:
    if job.kind != "merge":
        return _OF_RULE[WeightedSum](None)
    context = tensor_context_of(job)
    rounds = plan.method.rounds(context, job.parameters)
    rule = plan.method.rule(context, job.parameters)
    calls = [call for statistics in rounds for statistic in statistics for call in statistic.calls()]
    of_rule = _OF_RULE[type(rule)](rule) if type(rule) in _OF_RULE else frozenset[str]()
    return of_rule.union(*map(groups_of_call, calls))
