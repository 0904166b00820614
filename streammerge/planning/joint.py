"""Plans whose outputs are made from the same reads: the points of a sweep.

The plans differ only in the parameters of their jobs. They share tensors, layout and buffers, and divide the memory
together: a piece's inputs stay in its buffer while one output after the other is merged into a slot of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from streammerge.algebra.extent import Extent
from streammerge.errors import BudgetError
from streammerge.formats.parts import all_parts
from streammerge.planning.job import Job
from streammerge.planning.memory.allocate import Needs, lists_nbytes
from streammerge.planning.memory.division import Division
from streammerge.planning.needs import likeness, tensor_context_of
from streammerge.planning.plan import MergePlan

MOST_AT_ONCE = 8
"""Most outputs that are computed at a time; more would make the pieces small."""


def like(first: MergePlan, plan: MergePlan) -> MergePlan | None:
    """Return a plan that shares everything but parameters with the first one; None if it differs in anything else."""
    same = (
        plan.layout == first.layout
        and plan.backend is first.backend
        and plan.device == first.device
        and plan.seed == first.seed
        and len(plan.jobs) == len(first.jobs)
        and all(map(_are_alike, plan.jobs, first.jobs))
        and all(
            own.extent == need.extent
            for own, need in zip(plan.division.needs, first.division.needs, strict=True)
        )
        and all(
            plan.backend_of(own) is first.backend_of(job)
            for own, job in zip(plan.jobs, first.jobs, strict=True)
        )
    )
    if not same:
        return None
    jobs = tuple(
        replace(job, parameters=own.parameters) for job, own in zip(first.jobs, plan.jobs, strict=True)
    )
    return replace(plan, jobs=jobs, layout=first.layout, stages=first.stages)


def _are_alike(one: Job, other: Job) -> bool:
    return (one.name, one.dtype, one.shape, one.kind, one.members, one.parts, type(one.encoder)) == (
        other.name,
        other.dtype,
        other.shape,
        other.kind,
        other.members,
        other.parts,
        type(other.encoder),
    ) and _places(one) == _places(other)


def _places(job: Job) -> list[tuple[object, ...]]:
    """Return what a job reads, and where its bytes lie."""
    files = [
        (part.dtype, part.shape, getattr(part, "path", ""), getattr(part, "offset", 0))
        for part in all_parts(job.inputs)
    ]
    return [*((ref.dtype, ref.n_elements) for ref in (*job.held, *job.grams)), *files]


def joined(plans: Sequence[MergePlan]) -> list[MergePlan]:
    """Return plans that divide the memory together; a single plan stays as it is.

    Parameters
    ----------
    plans
        A plan, and others that are `like` it.

    Raises
    ------
    BudgetError
        If the memory does not suffice for all of them at a time.
    """
    if len(plans) == 1:
        return list(plans)
    at_once = _computed_at_once(plans)
    one_by_one = _divided(plans, {})
    if at_once:
        try:
            several = _divided(plans, at_once)
        except BudgetError:
            return one_by_one
        if _streamed(several[0]) == _streamed(one_by_one[0]):
            return several
    return one_by_one


def _streamed(plan: MergePlan) -> int:
    return sum(work.reads_twice for work in plan.work)


def _computed_at_once(plans: Sequence[MergePlan]) -> dict[int, int]:
    """Return the number of outputs that are computed at a time, by the ordinals of jobs where it is more than one."""
    known: dict[tuple[object, ...], int] = {}
    found = {}
    first = plans[0]
    for jobs in zip(*(plan.jobs for plan in plans), strict=True):
        job = jobs[0]
        if job.kind != "merge" or job.encoder is not None or not first.backend_of(job).compiled:
            continue
        key = tuple(likeness(own, first.method) for own in jobs)
        if key not in known:
            rules = [first.method.rule(tensor_context_of(own), own.parameters).unscaled for own in jobs]
            counts = Counter(rule for rule in rules if rule is not None)
            known[key] = min(MOST_AT_ONCE, max(counts.values(), default=1))
        if known[key] > 1:
            found[job.ordinal] = known[key]
    return found


def _divided(plans: Sequence[MergePlan], at_once: Mapping[int, int]) -> list[MergePlan]:
    """Return the plans with their memory divided; `at_once`: as `_computed_at_once` returns it."""
    first = plans[0]
    versions = [
        tuple(
            replace(job, keeps_inputs=True, outputs_at_once=at_once.get(job.ordinal, 1)) for job in plan.jobs
        )
        for plan in plans
    ]
    needs = [plan.division.needs for plan in plans]
    lists = first.division.lists + sum(
        lists_nbytes(0, 0, plan.jobs, own) for plan, own in zip(plans[1:], needs[1:], strict=True)
    )
    together = tuple(
        _together([plan.jobs[i] for plan in plans], [own[i] for own in needs], plans)
        for i in range(len(first.jobs))
    )
    division = Division(
        first.division.budget,
        versions[0],
        together,
        lists,
        first.method,
        first.backend,
        tuple(versions[1:]),
    )
    allocation = division.allocate()
    return [
        replace(
            plan,
            jobs=jobs,
            work=allocation.work,
            budget=allocation.budget,
            statistics_memory=allocation.statistics,
            division=division,
        )
        for plan, jobs in zip(plans, versions, strict=True)
    ]


def _together(jobs: Sequence[Job], needs: Sequence[Needs], plans: Sequence[MergePlan]) -> Needs:
    """Return the needs of a tensor that several outputs are merged from in one piece.

    Outputs with the same statistics take them once; the memory suffices for those of all others at a time.
    """
    rounds = [tuple(map(tuple, plan.rounds_of(job))) for plan, job in zip(plans, jobs, strict=True)]
    distinct = list(dict(zip(rounds, needs, strict=True)).values())
    return Needs(
        access=max((need.access for need in needs), key=list(Extent).index),
        holds=any(need.holds for need in needs),
        sums=any(need.sums for need in needs),
        extent=needs[0].extent,
        ranks=sum(need.ranks for need in distinct),
        partials=sum(need.partials for need in distinct),
        kept=sum(need.kept for need in needs),
    )
