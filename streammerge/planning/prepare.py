"""Turn opened models and a caller's options into a plan: choose device, backend and budget, then make the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from streammerge.algebra.rules.matrix_merge import widening_bytes
from streammerge.backends.base import Backend
from streammerge.backends.cpu.backend import CPU
from streammerge.checkpoint.companions import CompanionIndex
from streammerge.checkpoint.index import TensorIndex
from streammerge.config.schema import MergeConfig
from streammerge.errors import BudgetError, InputError, printable
from streammerge.formats.refs import SourceRef
from streammerge.io import volumes
from streammerge.io.object_upload import upload_nbytes
from streammerge.methods.registry import Method
from streammerge.numerics.compiled import NOWHERE, kernel_cache, lacking, unusable_kernels
from streammerge.planning.backend import (
    Device,
    backend_on,
    find_device,
    formulas_of,
    has_bits_of_device,
    operator_bytes,
    reserve_of,
    rest_of,
    workload_of,
)
from streammerge.planning.device import host_of, volume_of
from streammerge.planning.inputs import Inputs
from streammerge.planning.job import Job
from streammerge.planning.low_rank.memory import RESERVE
from streammerge.planning.make import Resources, make_plan
from streammerge.planning.memory import budget as budgets
from streammerge.planning.moe.method import reserve_for
from streammerge.planning.needed_kernels import needed_kernels
from streammerge.planning.needs import tensor_context_of
from streammerge.planning.on_device import why_not_fused
from streammerge.planning.options import PlanOptions
from streammerge.planning.plan import MergePlan
from streammerge.units import format_size

WORTH_COMPILING = 200_000_000
"""Size of inputs in bytes; torch merges less in the time that compiling the kernels takes."""
NO_ROOM = "--memory leaves no room for a GPU's libraries"
TOO_SMALL = "all tensors are small, or are computed as they are read (adapters, gathered rows)"
DECOMPOSED = "torch decomposes its matrices, and the torch that is installed finds no GPU"
SLOWER = (
    "the compiled kernels cannot be used ({}): torch computes the merge, with the same bits, but much slower"
)


def prepare(config: MergeConfig, method: Method, inputs: Inputs, options: PlanOptions) -> MergePlan:
    """Return the plan of a merge of opened models.

    Raises
    ------
    InputError
        If the models, the config or the memory do not allow the merge.
    """
    asked = (
        "cpu" if config.moe is not None and options.device == "auto" else options.device
    )  # nothing is computed
    device = find_device(
        asked,
        options.memory,
        lambda: workload_of(method, len(inputs.models), volume_of(_tensors(inputs))),
        # Where the output depends on the device, it must not change with what the first run has read.
        lambda: host_of(_paths(inputs), options.threads, cold=has_bits_of_device(method)),
    )
    try:
        return _prepared(config, method, inputs, options, device)
    except BudgetError:
        if options.device != "auto" or device.name == CPU.device:
            raise
        return _prepared(config, method, inputs, options, Device(CPU.device, NO_ROOM))


def _prepared(
    config: MergeConfig, method: Method, inputs: Inputs, options: PlanOptions, device: Device
) -> MergePlan:
    """Return the plan of a merge on a chosen device."""
    chosen, lacks = backend_on(device.name, options.kernels)
    if lacks is not None:
        options = replace(options, notes=(lacks, *options.notes))

    def plan_on(backend: Backend) -> MergePlan:
        read = inputs.own if inputs.merged is None else (*inputs.own, inputs.merged)
        reserve = reserve_of(backend, method, read, scaled=config.lines is not None) + operator_bytes(
            inputs.grams
        )
        reserve += 0 if config.lora is None else RESERVE
        reserve += volumes.held_nbytes(_paths(inputs))
        reserve += upload_nbytes(options.shard_size) if options.streamed else 0
        reserve = reserve if config.moe is None else max(reserve, reserve_for(config.moe))
        budget = budgets.make_budget(options.memory, options.threads, reserve)
        return make_plan(config, method, inputs, Resources(budget, device, backend), options)

    plan = _told(plan_on(chosen))
    _check_room(plan)
    if not chosen.compiled or method.is_formula:
        return plan
    needed = needed_kernels(plan)
    if (missing := unusable_kernels(needed)) is not None:
        note = SLOWER.format(f"{missing}; install a numba version that supports this numpy")
        options = replace(options, notes=(note, *options.notes))
        return plan_on(rest_of(chosen))
    return _unless_cold(plan, plan_on, rest_of(chosen)) if lacking(needed) and not options.kernels else plan


def _told(plan: MergePlan) -> MergePlan:
    """Return the plan, with a warning if it has a GPU that nothing is computed on."""
    merged = [job for job in plan.jobs if job.kind == "merge"]
    if (
        plan.backend.open_lane is None
        or not merged
        or any(plan.work[job.ordinal].on_device for job in merged)
    ):
        return plan
    if any(not plan.backend_of(job).on_host for job in merged):  # asked last, since it may import torch
        return plan
    note = f"nothing of this merge is computed on {plan.device}: {_why_nothing(plan, merged)}; use --device cpu, which needs less memory"
    return replace(plan, warnings=(*plan.warnings, note))


def _check_room(plan: MergePlan) -> None:
    """Refuse a merge one of whose matrices a GPU cannot hold: half of its bits would be a different device's.

    Raises
    ------
    InputError
        If the GPU has too little free memory.
    """
    largest = 0, ""
    for job in plan.jobs:
        if job.matrix is not None and not plan.backend_of(job).on_host:
            taken = plan.method.workspace_bytes(tensor_context_of(job), job.n_elements)
            largest = max(largest, (taken + widening_bytes(job.matrix_elements), job.name))
    room = formulas_of(plan.backend).room if largest[0] else None
    if room is not None and largest[0] > (free := room(plan.device)):
        raise InputError(
            f"tensor {printable(largest[1])}: decomposing it takes {format_size(largest[0])} of the GPU's memory, of which "
            f"{format_size(free)} are free: use --device cpu"
        )


def _why_nothing(plan: MergePlan, merged: Sequence[Job]) -> str:
    """Return why no tensor is merged on the device, in a few words."""
    if any(job.matrix is not None for job in merged):
        return DECOMPOSED
    reasons = {why_not_fused(job, plan.method, plan.backend) for job in merged}
    return f"{plan.method.name}: {reasons.pop()}" if len(reasons) == 1 and None not in reasons else TOO_SMALL


def _tensors(inputs: Inputs) -> list[SourceRef]:
    """Return every tensor of the models and the base."""
    return [ref for index in inputs.own for ref in index.values()]


def _paths(inputs: Inputs) -> list[str]:
    """Return the path of every file whose header was read, those of the stages included."""
    opened: list[TensorIndex | CompanionIndex] = [*inputs.own, *inputs.bases, *inputs.fishers, *inputs.grams]
    stamps = [stamp for index in opened for stamp in index.stamps]
    stamps += [stamp for stage in inputs.stages for some in stage.stamped.values() for stamp in some]
    return [stamp.path for stamp in stamps]


def _unless_cold(plan: MergePlan, plan_on: Callable[[Backend], MergePlan], rest: Backend) -> MergePlan:
    """Return the plan whose kernels are not compiled, or a plan for torch if the merge is too small to justify that."""
    cache = kernel_cache()
    if cache.directory is not None and not is_small(plan):
        return plan
    try:
        other = plan_on(rest)
    except BudgetError:  # torch needs more memory
        return plan
    if cache.directory is not None:
        return other
    note = SLOWER.format(NOWHERE.format("; ".join(cache.refused)))
    return replace(other, warnings=(note, *other.warnings))


def is_small(plan: MergePlan) -> bool:
    """Return whether a merge finishes before its kernels would be compiled."""
    return sum(index.nbytes for index in plan.inputs) < WORTH_COMPILING
