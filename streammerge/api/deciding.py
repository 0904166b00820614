"""`plan`: everything about a merge, from headers alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from streammerge.api.gates import check_gates
from streammerge.api.reading import ConfigLike, read_config
from streammerge.config.schema import MergeConfig
from streammerge.config.wording import refuse
from streammerge.errors import printable
from streammerge.io.volumes import as_path, is_url
from streammerge.machine import available_memory, own_memory, shortage
from streammerge.methods.registry import Method, get_method
from streammerge.output.place import place_of
from streammerge.output.stage_files import stage_folder
from streammerge.planning.averages import settle_checkpoints
from streammerge.planning.inputs import Inputs, Sources, open_inputs
from streammerge.planning.low_rank.storage import MERGE, MergeNeededError
from streammerge.planning.memory.enough import with_enough
from streammerge.planning.moe.method import MOE
from streammerge.planning.options import DEFAULT_SHARD_SIZE, MAX_READS, PlanOptions
from streammerge.planning.plan import MergePlan
from streammerge.planning.prepare import prepare
from streammerge.planning.resolve.base_models import settle_base
from streammerge.planning.stages import StageResult, check_reads, stage_index
from streammerge.records import dataclass
from streammerge.units import nbytes_of

SWEEP_CURE = (
    "a sweep is several merges: run `streammerge sweep CONFIG OUT`, whose points are verified against their own "
    "streammerge_config.yml; or remove the key"
)


def plan(
    config: ConfigLike,
    *,
    memory: str | int | None = None,
    threads: int | None = None,
    device: str = "auto",
    shard_size: str | int = DEFAULT_SHARD_SIZE,
    seed: int | None = None,
    methods: str | os.PathLike[str] | None = None,
    kernels: bool | None = None,
    copy_tokenizer: bool = True,
    write_model_card: bool = True,
    max_reads: float = MAX_READS,
    out: str | os.PathLike[str] | None = None,
) -> MergePlan:
    """Decide everything about a merge from headers alone; nothing is written.

    Parameters
    ----------
    config
        Path of a YAML file, its text (more than one line), or the equivalent mapping.
    memory
        Bound of the process's peak resident memory, ``"2GiB"`` or bytes; default: half of what is free.
    threads
        CPUs to keep busy; default: those available.
    device
        ``auto``, ``cpu`` or ``cuda[:N]``.
    shard_size
        Most bytes of tensors in one output file.
    seed
        Overrides the config's.
    methods
        A Python file with methods of your own.
    kernels
        True: use the compiled kernels, and compile them if needed. False: use the torch formulas, which give the same
        bits. Default: the kernels, or the formulas for a small merge whose kernels are not compiled yet.
    copy_tokenizer, write_model_card
        False: leave it out of the output.
    max_reads
        Bytes that stages may read for each byte of the inputs.
    out
        The output, which decides by its name whether it is a directory (default) or a single ``.safetensors`` file.

    Returns
    -------
    MergePlan
        `summary()` gives method, models, tensors, bytes and memory; `warnings` lists doubtful points of the config and the
        models; `jobs` lists every tensor.

    Raises
    ------
    InputError
        If the config, a model or the memory does not allow the merge.

    Examples
    --------
    >>> print(streammerge.plan("ties.yml", memory="4GiB").summary())  # doctest: +SKIP
    method    ties
    models    2: models/llama-math, models/llama-code
    base      models/llama-base
    tensors   291 tensors, 6,738,415,616 parameters, BF16
    bytes     reads 37.7 GiB, writes 12.6 GiB
    memory    at most 4.0 GiB, on cpu, 16 threads
    """
    parsed = read_config(config, methods)
    options = options_of(
        memory=memory,
        threads=threads,
        device=device,
        kernels=kernels,
        shard_size=shard_size,
        seed=seed,
        max_reads=max_reads,
        copy_tokenizer=copy_tokenizer,
        write_model_card=write_model_card,
    )
    file = None if out is None else place_of(as_path(out)).file
    return plan_stages(parsed, replace(options, file=file, streamed=out is not None and is_url(out)))


def options_of(
    *,
    memory: str | int | None,
    shard_size: str | int,
    copy_tokenizer: bool,
    write_model_card: bool,
    **others: Any,
) -> PlanOptions:
    """Return the options of a plan from those that callers give; `others` are taken as they are."""
    total = nbytes_of(memory)
    warning = None if total is None else shortage(total, available_memory(), own_memory())
    return PlanOptions(
        memory=total,
        shard_size=nbytes_of(shard_size) or DEFAULT_SHARD_SIZE,
        notes=() if warning is None else (warning,),
        left_out=(
            *(() if copy_tokenizer else ("tokenizer",)),
            *(() if write_model_card else ("model card",)),
        ),
        **others,
    )


def plan_stages(config: MergeConfig, options: PlanOptions) -> MergePlan:
    """Return the plan of a config; it contains the plans of its stages.

    Raises
    ------
    InputError
        If a config, a model or the memory does not allow the merge.
    """

    def decide(memory: int | None) -> MergePlan:
        given = replace(options, memory=memory)
        return plan_opened(config, open_all(config, given), given)

    return with_enough(decide, options.memory)


@dataclass(frozen=True)
class Opened:
    """The opened models of a config, and the plans of its stages."""

    inputs: Inputs
    notes: tuple[str, ...]
    """Warnings about the stages."""


def open_all(config: MergeConfig, options: PlanOptions) -> Opened:
    """Plan the stages of a config and open every model, for one plan or for several that differ in parameters.

    Raises
    ------
    InputError
        If a model is missing or malformed, or the config of a stage or the memory does not allow the merge.
    """
    results: list[StageResult] = []
    for stage in config.stages:
        settled, method = settle(stage)
        inputs = open_inputs(settled, method, Sources(stages=tuple(results)))
        plan = prepare(settled, method, inputs, replace(options, notes=(), left_out=(), file=None))
        results.append(StageResult(plan, stage_index(plan, stage_folder(plan))))
    settled, method = settle(config)
    inputs = open_inputs(settled, method, Sources(stages=tuple(results)))
    return Opened(inputs, tuple(_notes_of(results)))


def plan_opened(config: MergeConfig, opened: Opened, options: PlanOptions) -> MergePlan:
    """Return the plan of a config whose models are opened.

    Raises
    ------
    InputError
        If the config or the memory does not allow the merge.
    """
    settled, method = settle(config)
    options = replace(options, notes=(*options.notes, *opened.notes))
    try:
        plan = prepare(settled, method, opened.inputs, options)
    except MergeNeededError:
        plan = prepare(settled, method, _with_merge(settled, method, opened.inputs, options), options)
    check_reads(plan, options.max_reads)
    check_gates(plan)
    return plan


def _with_merge(config: MergeConfig, method: Method, inputs: Inputs, options: PlanOptions) -> Inputs:
    """Return the inputs with their merge as one more stage, in fp64, of which an adapter is made."""
    merge = replace(config, name=MERGE, lora=None, dtype="F64", out_dtype=None)
    stage = prepare(merge, method, inputs, replace(options, notes=(), left_out=(), file=None))
    merged = stage_index(stage, inputs.template.directory)
    return replace(inputs, merged=merged, stages=(*inputs.stages, stage))


def _notes_of(results: Sequence[StageResult]) -> list[str]:
    """Return the warnings of stages, and notes on folders that their names hide."""
    notes = []
    for result in results:
        name = printable(result.name, 80)
        if os.path.lexists(os.path.expanduser(result.name)):
            notes.append(f"stage {name} hides the folder of that name: rename one if the folder is meant")
        notes += [f"stage {name}: {warning}" for warning in result.plan.warnings]
    return notes


def settle(config: MergeConfig) -> tuple[MergeConfig, Method]:
    """Return a config with its checkpoints found and its bases determined, and its method.

    Raises
    ------
    InputError
        If there is no such method, or the config does not suit it.
    """
    if config.sweep:
        refuse(config.sweep[0].path.rpartition(".")[0], SWEEP_CURE)
    if config.moe is not None:
        return config, MOE
    found = settle_checkpoints(config)
    method = get_method(found.merge_method, f"{found.where}: merge_method")
    return settle_base(found, method), method
