"""`compare`: how models differ from their base and from each other, in one pass over their files."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from streammerge.api.feedback import OnEvent, controlled
from streammerge.checkpoint.tensor_kinds import kind_of
from streammerge.config.reading import config_from_mapping
from streammerge.engine.first_use import CannotCompileError
from streammerge.engine.measuring import measure
from streammerge.engine.worker import Answers
from streammerge.errors import InputError
from streammerge.events import Control
from streammerge.machine import available_memory, own_memory, shortage
from streammerge.methods.comparison import COMPARISON, TensorDifference, difference_of
from streammerge.planning.inputs import Sources, open_inputs
from streammerge.planning.job import Job
from streammerge.planning.memory.enough import with_enough
from streammerge.planning.needs import layer_of, tensor_context_of
from streammerge.planning.options import PlanOptions
from streammerge.planning.plan import MergePlan
from streammerge.planning.prepare import SLOWER, prepare
from streammerge.planning.resolve.base_models import settle_base
from streammerge.report.comparison import ComparedTensor, Comparison
from streammerge.report.pages.comparison import MOST_DRAWN, comparison_page
from streammerge.report.pages.needed import check_memory, check_page, write_page
from streammerge.units import nbytes_of

AnyPath = str | os.PathLike[str]


def compare(
    models: Sequence[AnyPath],
    base: AnyPath | None = None,
    *,
    memory: str | int | None = None,
    threads: int | None = None,
    device: str = "auto",
    html: AnyPath | None = None,
    progress: bool = True,
    on_event: OnEvent | None = None,
    stop: threading.Event | None = None,
    signal_received: Callable[[], int | None] = lambda: None,
) -> Comparison:
    """Measure how models differ from their base and from each other, out of core; nothing is written.

    Parameters
    ----------
    models
        Directories, files, or names in the Hugging Face cache.
    base
        The model that they were fine-tuned from; None: the first of them.
    memory
        Bound of the process's peak resident memory, ``"2GiB"`` or bytes; default: half of what is free.
    threads
        CPUs to keep busy; default: those available.
    device
        ``auto``, ``cpu`` or ``cuda[:N]``.
    html
        A file to write: one page with pictures, which needs no network. It takes the extra ``pages``.
    progress
        Whether to show a bar (on terminals and in notebooks) or, elsewhere, lines on stderr.
    on_event
        Receives every event, warnings included, in the calling thread, instead of the bar and Python's warnings.
    stop
        Set it, from a different thread, to stop.
    signal_received
        Returns the number of the signal that set `stop`.

    Returns
    -------
    Comparison
        Norms, cosines, signs and magnitudes. All of it is exact (integers, and fp64 sums in one order): the same bits
        whatever the memory and the threads.

    Raises
    ------
    InputError
        If the models or the memory do not allow it, or a value is not finite.
    WorldError
        If the machine cannot read them, or cannot write the page.
    Stopped
        If `stop` was set.

    Examples
    --------
    >>> found = streammerge.compare(["models/math", "models/code"], "models/base")  # doctest: +SKIP
    >>> found.cosines[0][1]  # doctest: +SKIP
    0.013
    """
    if html is not None:
        check_page("html", Path(html))
    found = compared(
        models,
        base,
        PlanOptions(memory=nbytes_of(memory), threads=threads, device=device, tensors_only=True),
        lambda: controlled(on_event, progress, "comparing", stop, signal_received),
        draws=html is not None,
    )
    if html is not None:
        write_page(Path(html), comparison_page(found))
    return found


def compared(
    models: Sequence[AnyPath],
    base: AnyPath | None,
    options: PlanOptions,
    feedback: Callable[[], AbstractContextManager[Control]],
    *,
    draws: bool,
) -> Comparison:
    """Measure models as `compare` does.

    Parameters
    ----------
    feedback
        Lends the control of the run.
    draws
        Whether the memory must suffice to draw a page afterwards.
    """

    def decide(memory: int | None, kernels: bool | None = None) -> MergePlan:
        plan = _plan(
            [os.fspath(model) for model in models],
            None if base is None else os.fspath(base),
            replace(options, memory=memory),
            kernels,
        )
        if draws:
            check_memory("a page", plan.budget, points_of(plan))
        return plan

    plan = with_enough(decide, options.memory)
    with feedback() as control:
        try:
            answers = measure(plan, control)
        except CannotCompileError as error:
            control.warn(SLOWER.format(error))
            plan = decide(options.memory, kernels=False)
            answers = measure(plan, control)
    return comparison_of(plan, answers)


def comparison_of(
    plan: MergePlan, answers: Mapping[int, Answers], found_in: Callable[[Job], TensorDifference] | None = None
) -> Comparison:
    """Return what the statistics of a comparison's plan say.

    Parameters
    ----------
    found_in
        Function that returns the differences in a job's tensor; default: those that the rounds of `COMPARISON` give.
    """
    assert plan.base is not None

    def of(job: Job) -> TensorDifference:
        return difference_of(tensor_context_of(job), answers[job.ordinal])

    tensors = tuple(
        ComparedTensor(
            job.name,
            kind_of(job.name),
            layer_of_job(job),
            tuple(ref.stored_dtype for ref in job.inputs),
            (found_in or of)(job),
        )
        for job in plan.jobs
        if job.ordinal in answers
    )
    names = tuple(model.reference for model in plan.models)
    return Comparison(plan.base.reference, names, tensors, plan.tensors_left_out)


def points_of(plan: MergePlan) -> int:
    """Return the number of points of a figure by layer."""
    return len({layer_of_job(job) for job in plan.jobs}) * min(len(plan.models), MOST_DRAWN)


def layer_of_job(job: Job) -> tuple[str, int] | None:
    """Return the stack that a tensor's layer lies in, and the number of the layer; None outside the layers."""
    layer, _ = layer_of(job.name, job.stacks)
    stack = next((prefix for prefix in job.stacks if job.name.startswith(f"{prefix}.")), "")
    return None if layer is None else (stack, layer)


def _plan(models: list[str], base: str | None, options: PlanOptions, kernels: bool | None) -> MergePlan:
    """Return the plan that reads every tensor once."""
    if base is None:
        if len(models) < 2:
            raise InputError("compare: only one model and no base: name at least two models, or give --base")
        base, *models = models
    if not models:
        raise InputError("compare: no model: name at least one")
    config = config_from_mapping(
        {"merge_method": COMPARISON.name, "base_model": base, "models": models, "tensors": "common"}
    )
    settled = settle_base(config, COMPARISON)
    total = options.memory
    warning = None if total is None else shortage(total, available_memory(), own_memory())
    options = replace(options, kernels=kernels, notes=() if warning is None else (warning,))
    return prepare(settled, COMPARISON, open_inputs(settled, COMPARISON, Sources()), options)
