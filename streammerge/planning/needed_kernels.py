"""Which groups of kernels a plan will call: known before a byte is read, so that no others are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
    ranked,
)
from streammerge.algebra.scores import Importance, Score, Spread
from streammerge.algebra.task_vectors import TaskVector
from streammerge.planning.job import Job
from streammerge.planning.memory.buffers import is_copied
from streammerge.planning.needs import likeness, tensor_context_of
from streammerge.planning.plan import MergePlan
from streammerge.statistics.kinds import (
    AbsSum,
    Band,
    ColumnGram,
    FisherSquares,
    Gram,
    Largest,
    LowWords,
    NonZero,
    Quantile,
    SignTotal,
    Squares,
    TieIndex,
    TopK,
    Touches,
)

Names = frozenset[str]


def _of_ranked(what: TaskVector | Score) -> Names:
    return _OF_RANKED[type(what)]


def _of_merge(merge: TaskVectorMerge) -> Names:
    return frozenset({"ranked" if ranked(merge) else "task_vectors"})


def _of_selection(what: Squares | SelectedMerge) -> Names:
    chosen = frozenset[str]() if what.selection is None else _of_ranked(what.selection.score)
    return chosen | {"selected"}


_OF_RANKED: Mapping[type, Names] = {
    TaskVector: frozenset({"ranks"}),
    Spread: frozenset({"spread"}),
    Importance: frozenset({"importance"}),
}
_OF: Mapping[type, Callable[[Any], Names]] = {
    TopK: lambda statistic: _of_ranked(statistic.vector),
    Band: lambda statistic: _of_ranked(statistic.vector),
    TieIndex: lambda statistic: _of_ranked(statistic.vector),
    NonZero: lambda statistic: _of_ranked(statistic.score),
    Largest: lambda statistic: _of_ranked(statistic.score),
    Quantile: lambda statistic: _of_ranked(statistic.score),
    AbsSum: lambda statistic: frozenset({"ranked" if statistic.vector.rank_drop else "abs_sums"}),
    Squares: _of_selection,
    Touches: lambda statistic: frozenset({"touched"}),
    Gram: lambda statistic: frozenset({"dots"}),
    ColumnGram: lambda statistic: frozenset({"columns"}),
    SignTotal: lambda statistic: _of_merge(statistic.merge),
    LowWords: lambda statistic: frozenset({"words"}),
    FisherSquares: lambda statistic: frozenset({"fisher"}),
    WeightedSum: lambda rule: frozenset({"weighted_sum"}),
    CopyOf: lambda rule: frozenset({"weighted_sum"}),
    TaskVectorMerge: _of_merge,
    SelectedMerge: _of_selection,
    TouchedMerge: lambda rule: frozenset({"touched"}),
    FisherMean: lambda rule: frozenset({"fisher"}),
    RowCombination: lambda rule: frozenset({"dots", "rows"}),
    ColumnCombination: lambda rule: frozenset({"columns"}),
}
"""By the class of what a method asks or does; what is not here needs none."""
_BESIDE_TORCH = frozenset({"words", "adapters"})
"""What torch has no part in: random words are counted, and adapters applied, before it sees a value."""


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
        return _OF[WeightedSum](None)
    context = tensor_context_of(job)
    rounds = plan.method.rounds(context, job.parameters)
    wanted: Iterable[Any] = [statistic for statistics in rounds for statistic in statistics]
    found = [
        _OF[type(one)](one)
        for one in (*wanted, plan.method.rule(context, job.parameters))
        if type(one) in _OF
    ]
    return frozenset().union(*found)
