"""`merge --report`: a finished merge read back and measured, as one page. The merge itself never depends on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from streammerge.api.comparing import comparison_of, layer_of_job, points_of
from streammerge.checkpoint.index import open_model
from streammerge.engine.measuring import measure
from streammerge.engine.merge import Summary
from streammerge.engine.worker import Answers
from streammerge.errors import ConfigError, Stopped, printable
from streammerge.events import Control, Event
from streammerge.methods.comparison import REVIEW, output_difference_of
from streammerge.planning.needs import tensor_context_of
from streammerge.planning.plan import MergePlan
from streammerge.planning.review import plan_of_review, plan_of_rounding
from streammerge.report.comparison import Comparison
from streammerge.report.pages.merged import Kept, MergeReport, OutputSigns, merge_page
from streammerge.report.pages.needed import check_memory, check_page, write_page
from streammerge.units import format_size, plural

OUTPUT = "output"
"""The name of the output among the models."""


def check_report(option: str, path: Path, out: Path) -> None:
    """Refuse a report that cannot be drawn or written; see `check_page`."""
    check_page(option, path, outside=out if not out.is_file() else None)


def check_room(plan: MergePlan) -> None:
    """Refuse a merge whose report would not fit in the memory, before the merge begins.

    Raises
    ------
    BudgetError
        If it would not.
    """
    if plan.adapter is not None:
        raise ConfigError(
            f"{plan.config.where}: output: lora: --report is about merged models: leave it out; the residuals of the adapter are "
            "printed and recorded"
        )
    expected = {job.name: job.sources[0] for job in plan.jobs}
    stand_in = replace(
        plan.template, tensors=expected
    )  # the output does not exist yet; its tensors have these shapes
    check_memory("a report", plan.budget, points_of(plan_of_review(plan, stand_in)))
    if any(job.encoder is not None for job in plan.jobs):
        plan_of_rounding(plan, stand_in)


def write_report(plan: MergePlan, out: Path, summary: Summary, path: Path, control: Control) -> None:
    """Measure a finished output and write its page; whatever fails is a warning, since the merge is complete.

    Raises
    ------
    Stopped
        If the run is stopped meanwhile.
    """
    try:
        write_page(path, merge_page(_measured(plan, out, summary, control)))
    except Stopped:
        raise
    except Exception as error:
        if os.environ.get("STREAMMERGE_DEBUG"):
            raise
        why = printable(f"{error}" or type(error).__name__)
        control.warn(f"{printable(out)} is complete, but its report {printable(path)} was not written: {why}")


def _measured(plan: MergePlan, out: Path, summary: Summary, control: Control) -> MergeReport:
    output = replace(open_model(str(out)), reference=OUTPUT)
    quiet = Control(_only_progress(control.emit), control.stop, control.signal)
    review = plan_of_review(plan, output)
    has_base = review.method is REVIEW
    comparison: Comparison | None = None
    signs: tuple[OutputSigns, ...] = ()
    if review.jobs:
        comparison, signs = _of_review(review, measure(review, quiet))
    rounding = None
    if any(job.encoder is not None for job in plan.jobs):
        exact = plan_of_rounding(plan, output)
        if exact.jobs:
            rounding = comparison_of(exact, measure(exact, quiet))
    return MergeReport(
        out=os.fspath(out),
        method=plan.method.name,
        settings=_settings(plan, summary),
        models=[model.reference for model in plan.models],
        comparison=comparison,
        has_base=has_base,
        kept=_kept(plan, summary),
        densities=[(density.model, density.density) for density in summary.densities],
        signs=signs,
        rounding=rounding,
        profile=summary.profile,
        notes=_notes(summary, comparison),
    )


def _only_progress(emit: Callable[[Event], None]) -> Callable[[Event], None]:
    """Return a receiver that passes warnings and compiling on, and progress as that of a report."""

    def tell(event: Event) -> None:
        if event.kind == "progress":
            emit(Event("report", {"bytes_read": event.values["bytes_read"]}))
        elif event.kind in ("warning", "compiling", "compiled"):
            emit(event)

    return tell


def _of_review(
    review: MergePlan, answers: Mapping[int, Answers]
) -> tuple[Comparison, tuple[OutputSigns, ...]]:
    if review.method is not REVIEW:
        return comparison_of(review, answers), ()
    found = {
        job.ordinal: output_difference_of(tensor_context_of(job), answers[job.ordinal])
        for job in review.jobs
        if job.ordinal in answers
    }
    signs = tuple(
        OutputSigns(layer_of_job(review.jobs[ordinal]), one.with_model, one.moves)
        for ordinal, one in found.items()
    )
    return comparison_of(review, answers, lambda job: found[job.ordinal].difference), signs


def _kept(plan: MergePlan, summary: Summary) -> list[Kept]:
    every = range(len(plan.models))
    return [
        Kept(
            layer_of_job(plan.jobs[ordinal]),
            counts,
            plan.jobs[ordinal].n_elements,
            plan.jobs[ordinal].members or every,
        )
        for ordinal, counts in summary.kept.items()
    ]


def _settings(plan: MergePlan, summary: Summary) -> dict[str, str]:
    dtypes = ", ".join(sorted({part.dtype for job in plan.jobs for part in job.parts}))
    models = ", ".join(model.reference for model in plan.models)
    elements = sum(job.n_elements for job in plan.jobs)
    floored = (
        {}
        if summary.floored is None
        else {"decided by the floor": f"{100 * summary.floored['fraction']:.3g} %"}
    )
    return {
        "method": plan.method.name,
        "base": "none" if plan.base is None else plan.base.reference,
        "models": models,
        "seed": str(plan.seed),
        "output": f"{plural(len(plan.jobs), 'tensor')}, {elements:,} elements, {dtypes}, {format_size(plan.layout.nbytes)}",
        **floored,
    }


def _notes(summary: Summary, comparison: Comparison | None) -> list[str]:
    notes = []
    if summary.already_complete:
        notes.append("The merge was complete before this run, so there are no times.")
    elif summary.bytes_resumed:
        notes.append(
            f"{format_size(summary.bytes_resumed)} of the output were finished by an earlier run; the times are this run's."
        )
    if comparison is None:
        notes.append("No tensor was merged from several models alike, so there are no pictures of models.")
    elif comparison.left_out:
        notes.append(f"Not measured: {plural(len(comparison.left_out), 'tensor')}, listed below.")
    return notes
