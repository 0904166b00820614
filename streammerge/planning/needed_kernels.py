"""Find the groups of kernels that a plan will call, so that only these are compiled."""

from __future__ import annotations

from streammerge.algebra.rules import WeightedSum
from streammerge.backends.cpu.compile import kernels_of_call, kernels_of_rule
from streammerge.backends.cpu.registry import Names
from streammerge.backends.cpu.settling import GROUP
from streammerge.planning.job import Job
from streammerge.planning.needs import likeness, tensor_context_of
from streammerge.planning.plan import MergePlan

_BESIDE_TORCH = frozenset({"words", "adapters"})
"""Groups that the torch backend needs too: counting random words and applying adapters precede it."""


def needed_kernels(plan: MergePlan) -> Names:
    """Return the names of the groups (see `streammerge.backends.cpu.compile`) that a merge needs."""
    names: set[str] = set()
    seen: set[tuple[object, ...]] = set()
    for job in plan.jobs:
        names.update(*(ref.kernels for ref in (*job.inputs, *job.sources)))
        if job.encoder is not None:
            names |= job.encoder.kernels
        in_torch = not plan.backend_of(job).compiled
        key = (in_torch, bool(job.fishers), *likeness(job, plan.method))
        if not job.is_copied and key not in seen:
            seen.add(key)
            names |= _of_job(job, plan) & _BESIDE_TORCH if in_torch else _of_job(job, plan)
    return frozenset(names | {GROUP} if any(work.settles for work in plan.work) else names)


def _of_job(job: Job, plan: MergePlan) -> Names:
    if job.kind != "merge":
        return kernels_of_rule(WeightedSum((1.0,)))
    context = tensor_context_of(job)
    rounds = plan.method.rounds(context, job.parameters)
    calls = [call for statistics in rounds for statistic in statistics for call in statistic.calls()]
    names = kernels_of_rule(plan.method.rule(context, job.parameters))
    return names.union(*map(kernels_of_call, calls))
