"""`plan`: everything about a merge, from headers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streammerge.api.devices import choose_device, nbytes_of
from streammerge.api.opening import Opened, Sources, open_inputs
from streammerge.checkpoint.companions import CompanionIndex
from streammerge.checkpoint.index import TensorIndex
from streammerge.config.reading import config_from_mapping, load_config, parse_config
from streammerge.config.schema import MergeConfig
from streammerge.engine.first_use import SLOWER, from_cold
from streammerge.machine import available_memory, own_memory, shortage
from streammerge.methods.catalog import load_builtin, load_file
from streammerge.methods.registry import Method, get_method
from streammerge.numerics.compiled import missing_kernels
from streammerge.planning.memory import budget as budgets
from streammerge.planning.plan import LeftOut, MergePlan, make_plan
from streammerge.planning.resolve.base_models import settle_base

ConfigLike = str | os.PathLike[str] | Mapping[str, Any]
DEFAULT_SHARD_SIZE = 5_000_000_000


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
) -> MergePlan:
    """Decide everything about a merge from headers alone; nothing is written.

    Parameters
    ----------
    config
        Path of a YAML file, the same as a mapping, or its text (of more than one line).
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
        False: the torch formulas in place of the compiled kernels; the bits are the same. True: the kernels, whatever
        compiling them takes. Default: the kernels, but while they are not compiled yet the formulas for a small merge.
    copy_tokenizer, write_model_card
        False: the output goes without.

    Returns
    -------
    MergePlan
        Its `summary()` has the method, the models, the tensors, the bytes and the memory; its `warnings` what the config
        and the models leave open; `jobs` every tensor.

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
    parsed, method = read_config(config, methods)
    total = nbytes_of(memory)
    notes = []
    if total is not None and (warning := shortage(total, available_memory(), own_memory())) is not None:
        notes.append(warning)
    left_out: list[LeftOut] = []
    if not copy_tokenizer:
        left_out.append("tokenizer")
    if not write_model_card:
        left_out.append("model card")
    return decide(
        parsed,
        method,
        open_inputs(parsed, method, Sources()),
        memory=total,
        threads=threads,
        device=device,
        shard_size=nbytes_of(shard_size) or DEFAULT_SHARD_SIZE,
        seed=seed,
        kernels=kernels,
        notes=notes,
        left_out=left_out,
    )


def read_config(
    config: ConfigLike, methods: str | os.PathLike[str] | None = None
) -> tuple[MergeConfig, Method]:
    """Return a config with its bases settled, and its method; `methods` is a file with methods of the user's own.

    Raises
    ------
    InputError
        If the config or the file of methods is bad.
    """
    parsed = _parse(config)
    load_builtin()
    if methods is not None:
        load_file(Path(methods))
    method = get_method(parsed.merge_method, f"{parsed.where}: merge_method")
    return settle_base(parsed, method), method


def _parse(config: ConfigLike) -> MergeConfig:
    if isinstance(config, Mapping):
        return config_from_mapping(config)
    if isinstance(config, str) and "\n" in config:
        return parse_config(config, "config")
    return load_config(config)


def decide(
    config: MergeConfig,
    method: Method,
    opened: Opened,
    *,
    memory: int | None,
    threads: int | None,
    device: str,
    shard_size: int,
    seed: int | None,
    kernels: bool | None,
    notes: Sequence[str] = (),
    left_out: Sequence[LeftOut] = (),
    tensors_only: bool = False,
) -> MergePlan:
    """Return the plan of a merge of opened models; the parameters are those of `plan` and of `make_plan`.

    Raises
    ------
    InputError
        If the models, the config or the memory do not allow the merge.
    """
    chosen = choose_device(device, memory, sum(index.nbytes for index in opened.own))
    wanted = chosen == "cpu" and kernels is not False
    missing = missing_kernels() if wanted and not method.is_formula else None
    slower = [] if missing is None else [SLOWER.format(f"{missing}; install a numba that suits this numpy")]

    def make(torch_only: bool) -> MergePlan:
        reserve = budgets.CUDA_RESERVE if chosen != "cpu" else _cpu_reserve(opened.own, method, torch_only)
        budget = budgets.make_budget(memory, threads, reserve + _mixer_bytes(opened.grams))
        return make_plan(
            config,
            method,
            opened.models,
            opened.base,
            budget,
            shard_size=shard_size,
            seed=seed,
            device=chosen,
            torch_only=torch_only,
            fishers=opened.fishers,
            grams=opened.grams,
            notes=[*slower, *notes],
            bases=opened.bases,
            left_out=left_out,
            tensors_only=tensors_only,
        )

    if not wanted or missing is not None:
        return make(True)
    return make(False) if kernels else from_cold(make(False), lambda: make(True))


def _mixer_bytes(grams: list[CompanionIndex]) -> int:
    """Return what is kept of the Gram matrices from one piece of a tensor to the next: fp64, of the largest."""
    return 8 * len(grams) * max((ref.n_elements for index in grams for ref in index.values()), default=0)


def _cpu_reserve(models: Sequence[TensorIndex], method: Method, torch_only: bool) -> int:
    wide = any(ref.dtype == "F64" for index in models for ref in index.values())
    uses_torch = torch_only or method.is_formula or method.gram or wide
    return budgets.TORCH_RESERVE if uses_torch else budgets.KERNEL_RESERVE
