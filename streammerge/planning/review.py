"""The plan that measures a finished merge: its output, read back, next to the tensors that it was merged from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streammerge.checkpoint.index import TensorIndex
from streammerge.formats.refs import SourceRef
from streammerge.methods.comparison import COMPARISON, REVIEW
from streammerge.methods.registry import Method
from streammerge.planning.files.surroundings import Surroundings
from streammerge.planning.job import Job
from streammerge.planning.layout import Layout
from streammerge.planning.memory.allocate import Needs
from streammerge.planning.memory.division import Division
from streammerge.planning.needs import likeness, needs_of
from streammerge.planning.plan import MergePlan
from streammerge.planning.stages import stage_index, with_shared

OTHER_MODELS = "merged from other models than most tensors"
COPIED = "copied"
UNLIKE = "not in the output under this name and shape"


def plan_of_review(plan: MergePlan, output: TensorIndex) -> MergePlan:
    """Return the plan that measures an output next to the models that it was merged from; the output is the last model.

    A merge without a base has the output as its base: the task vectors are then what the models differ by from the output.

    Raises
    ------
    BudgetError
        If the memory does not suffice.
    """
    merged = [job for job in plan.jobs if job.kind == "merge"]
    usual = Counter((job.members, job.base is not None) for job in merged).most_common(1)
    left_out = {job.name: COPIED for job in plan.jobs if job.kind != "merge"}
    jobs: list[Job] = []
    for job in merged:
        ref = output.get(job.name)
        if ref is None or ref.shape != job.shape:
            left_out[job.name] = UNLIKE
        elif (job.members, job.base is not None) != usual[0][0]:
            left_out[job.name] = OTHER_MODELS
        elif job.base is None:
            jobs.append(_measured(job, len(jobs), ref, job.sources, COMPARISON))
        else:
            jobs.append(_measured(job, len(jobs), job.base, (*job.sources, ref), REVIEW))
    members, has_base = usual[0][0] if usual else ((), False)
    models = tuple(plan.models[i] for i in members or range(len(plan.models)))
    if has_base:
        method, models, base = REVIEW, (*models, output), plan.base or plan.bases[0]
    else:
        method, base = COMPARISON, output
    measuring = replace(plan, models=models, base=base, bases=(), tensors_left_out=left_out)
    return _planned(measuring, jobs, method)


def plan_of_rounding(plan: MergePlan, output: TensorIndex) -> MergePlan:
    """Return the plan that measures what storing costs: the merged fp32 values are the base, the output is the model.

    Only tensors that are stored as codes are measured. The merge is computed once more, as a stage.

    Raises
    ------
    BudgetError
        If the memory does not suffice.
    """
    plain = [replace(job, encoder=None) for job in plan.jobs]
    config = replace(plan.config, name=_NAME, quantize="none")
    exact = _planned(replace(plan, config=config), plain, plan.method, as_merge=True)
    index = stage_index(exact, Path())
    jobs: list[Job] = []
    for job in plan.jobs:
        ref = output.get(job.name)
        if job.encoder is not None and ref is not None and ref.shape == job.shape:
            jobs.append(_measured(job, len(jobs), index[job.name], (ref,), COMPARISON))
    measuring = replace(plan, models=(output,), base=index, bases=(), stages=(*plan.stages, exact))
    lists = exact.division.lists + exact.statistics_memory.nbytes
    return _planned(measuring, jobs, COMPARISON, lists=lists)


_NAME = "\0exact"
"""The name of the stage that holds the merged values; no config can contain it."""


def _measured(job: Job, ordinal: int, base: SourceRef, models: Sequence[SourceRef], method: Method) -> Job:
    """Return the job that measures the tensors of a merge's job."""
    n = len(models)
    parameters: dict[str, Any] = {
        name: (one.default,) * n if one.per_model else one.default for name, one in method.parameters.items()
    }
    return with_shared(
        replace(
            job,
            ordinal=ordinal,
            dtype=base.dtype,
            kind="merge",
            sources=tuple(models),
            base=base,
            parameters=parameters,
            fishers=(),
            grams=(),
            members=(),
            shared=(),
            encoder=None,
        )
    )


def _planned(
    plan: MergePlan, jobs: Sequence[Job], method: Method, *, as_merge: bool = False, lists: int = 0
) -> MergePlan:
    """Return a plan with other jobs, for which the same memory is divided again.

    Parameters
    ----------
    as_merge
        Whether the plan still merges: it keeps its stores and the order of its tensors.
    lists
        Bytes of lists that the merge did not have.
    """
    chosen = tuple(jobs)
    known: dict[tuple[object, ...], Needs] = {}
    for job in chosen:
        key = likeness(job, method)
        if key not in known:
            known[key] = needs_of(job, method, chosen)
    needs = tuple(known[likeness(job, method)] for job in chosen)
    lists += plan.division.lists
    division = Division(plan.division.budget, chosen, needs, lists, method, plan.division.backend)
    allocation = division.allocate()
    divided = replace(
        plan,
        method=method,
        jobs=chosen,
        access=tuple(need.access for need in needs),
        work=allocation.work,
        budget=allocation.budget,
        division=division,
        statistics_memory=allocation.statistics,
        warnings=(),
        streamed=False,  # nothing is written
    )
    if as_merge:
        return divided
    return replace(
        divided,
        layout=Layout((), tuple(() for _ in chosen)),
        fishers=(),
        grams=(),
        tokenizer=None,
        vocabulary="",
        settings={},
        beside=Surroundings(),
    )
