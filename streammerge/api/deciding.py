"""`plan`: everything about a merge, from headers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streammerge.api.devices import choose_device, nbytes_of
from streammerge.api.opening import open_beside, open_models
from streammerge.compiled import missing_kernels
from streammerge.config.reading import config_from_mapping, load_config
from streammerge.engine.first_use import SLOWER, from_cold
from streammerge.index.fishers import FisherIndex, open_fisher, open_grams
from streammerge.index.model import TensorIndex
from streammerge.methods.catalog import load_builtin, load_file
from streammerge.methods.registry import Method, get_method
from streammerge.planning import budget as budgets
from streammerge.planning.bases import settle_base
from streammerge.planning.free_memory import available_memory, own_memory, shortage
from streammerge.planning.plan import LeftOut, MergePlan, make_plan

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
        Path of a YAML file, or the same as a mapping.
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

    Raises
    ------
    InputError
        If the config, a model or the memory does not allow the merge.
    """
    parsed = config_from_mapping(config) if isinstance(config, Mapping) else load_config(config)
    load_builtin()
    if methods is not None:
        load_file(Path(methods))
    method = get_method(parsed.merge_method, f"{parsed.where}: merge_method")
    parsed = settle_base(parsed, method)
    models, base, bases = open_models(parsed)
    fishers = open_beside("fisher", open_fisher, parsed, models) if method.fisher else []
    grams = open_beside("gram", open_grams, parsed, models) if method.gram else []
    total = nbytes_of(memory)
    nbytes = sum(index.nbytes for index in (*models, *([base] if base else [])))
    chosen = choose_device(device, total, nbytes)
    wanted = chosen == "cpu" and kernels is not False
    missing = missing_kernels() if wanted and not method.is_formula else None
    notes = [] if missing is None else [SLOWER.format(f"{missing}; install a numba that suits this numpy")]
    if total is not None and (warning := shortage(total, available_memory(), own_memory())) is not None:
        notes.append(warning)
    left_out: list[LeftOut] = []
    if not copy_tokenizer:
        left_out.append("tokenizer")
    if not write_model_card:
        left_out.append("model card")

    def decide(torch_only: bool) -> MergePlan:
        reserve = budgets.CUDA_RESERVE if chosen != "cpu" else _cpu_reserve(models, base, method, torch_only)
        budget = budgets.make_budget(total, threads, reserve + _mixer_bytes(grams))
        return make_plan(
            parsed, method, models, base, budget,
            shard_size=nbytes_of(shard_size) or DEFAULT_SHARD_SIZE, seed=seed, device=chosen, torch_only=torch_only, fishers=fishers,
            grams=grams, notes=notes, bases=bases, left_out=left_out,
        )  # fmt: skip

    if not wanted or missing is not None:
        return decide(True)
    return decide(False) if kernels else from_cold(decide(False), lambda: decide(True))


def _mixer_bytes(grams: list[FisherIndex]) -> int:
    """Return what is kept of the Gram matrices from one piece of a tensor to the next: fp64, of the largest."""
    return 8 * len(grams) * max((ref.n_elements for index in grams for ref in index.values()), default=0)


def _cpu_reserve(
    models: list[TensorIndex], base: TensorIndex | None, method: Method, torch_only: bool
) -> int:
    wide = any(ref.dtype == "F64" for index in (*models, *([base] if base else [])) for ref in index.values())
    uses_torch = torch_only or method.is_formula or method.gram or wide
    return budgets.TORCH_RESERVE if uses_torch else budgets.KERNEL_RESERVE
