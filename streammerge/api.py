"""Merging from Python: what the command line calls, and what users call."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from streammerge.compiled import missing_kernels
from streammerge.config.schema import MergeConfig, config_from_mapping, load_config
from streammerge.dtypes import NAMES
from streammerge.engine.fingerprint import check_belongs
from streammerge.engine.reader import Backend
from streammerge.engine.recompute import check_contents, check_made_from, recompute
from streammerge.engine.session import Event, NonFinite, Options, Summary, execute
from streammerge.engine.verify import Verdict, manifest_of
from streammerge.engine.verify import verify as verify_files
from streammerge.errors import InputError, printable
from streammerge.index.fishers import FisherIndex, open_fisher, open_grams
from streammerge.index.model import TensorIndex, open_model
from streammerge.methods.catalog import load_builtin, load_file
from streammerge.methods.registry import Method, get_method
from streammerge.planning import budget as budgets
from streammerge.planning.bases import settle_base
from streammerge.planning.free_memory import available_memory, own_memory, shortage
from streammerge.planning.plan import LeftOut, MergePlan, make_plan
from streammerge.report.card import model_card
from streammerge.units import parse_size

if TYPE_CHECKING:  # it imports torch
    from streammerge.fisher.compute import Computed
    from streammerge.gram.compute import Collected

ConfigLike = str | os.PathLike[str] | Mapping[str, Any]
DEFAULT_SHARD_SIZE = 5_000_000_000
DEFAULT_SAMPLE = 16
"""Pieces that `verify` recomputes."""
_GPU_DRIVER = "/dev/nvidiactl"
_WORTH_A_GPU = 8_000_000_000
"""Bytes of inputs; starting a GPU takes as long as merging these without it."""
_SLOWER = (
    "the compiled kernels cannot be used ({}): merging through torch, the same bits at a fraction of the speed; "
    "install a numba that suits this numpy"
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
    kernels: bool = True,
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
        False: the torch formulas in place of the compiled kernels; the bits are the same.
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
    models, base, bases = _open_models(parsed)
    fishers = _open_beside("fisher", open_fisher, parsed, models) if method.fisher else []
    grams = _open_beside("gram", open_grams, parsed, models) if method.gram else []
    total = _bytes(memory)
    nbytes = sum(index.nbytes for index in (*models, *([base] if base else [])))
    chosen = choose_device(device, total, nbytes)
    missing = missing_kernels() if chosen == "cpu" and kernels and not method.is_formula else None
    torch_only = chosen != "cpu" or not kernels or missing is not None
    reserve = budgets.CUDA_RESERVE if chosen != "cpu" else _cpu_reserve(models, base, method, torch_only)
    budget = budgets.make_budget(total, threads, reserve + _mixer_bytes(grams))
    notes = [] if missing is None else [_SLOWER.format(missing)]
    if total is not None and (warning := shortage(total, available_memory(), own_memory())) is not None:
        notes.append(warning)
    left_out: list[LeftOut] = []
    if not copy_tokenizer:
        left_out.append("tokenizer")
    if not write_model_card:
        left_out.append("model card")
    return make_plan(
        parsed, method, models, base, budget,
        shard_size=_bytes(shard_size) or DEFAULT_SHARD_SIZE, seed=seed, device=chosen, torch_only=torch_only, fishers=fishers,
        grams=grams, notes=notes, bases=bases, left_out=left_out,
    )  # fmt: skip


def merge(
    config: ConfigLike,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    device: str = "auto",
    io: Backend = "direct",
    profile: str | os.PathLike[str] | None = None,
    nonfinite: NonFinite = "error",
    hash_inputs: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    stop: threading.Event | None = None,
    signal_received: Callable[[], int | None] = lambda: None,
    **options: Any,
) -> Summary:
    """Merge into the directory `out`; run again after an interruption, it continues.

    Parameters
    ----------
    overwrite
        Discard what an earlier merge left in `out`.
    io
        ``direct``: past the page cache, except for what lies in it; ``read``: through it; ``mmap``: reads are
        copies out of a memory map.
    profile
        A JSON file to write: the seconds of every stage, and so what bounded the run.
    nonfinite
        ``error``: a NaN or an infinity, of an input or by overflow, stops the merge; ``warn``: it is written, at its own
        element alone, and reported.
    hash_inputs
        Hash every input file before the first byte, one more read of it: run again, the merge then knows a file that was
        touched or copied from one that changed. The manifest records the hashes.
    on_event
        Called from the calling thread with progress, warnings and the like.
    **options
        Those of `plan`.

    Raises
    ------
    StreammergeError
        See `streammerge.errors`.
    """
    if io not in get_args(Backend):
        raise InputError(f"io {printable(io)!r} is none of {', '.join(get_args(Backend))}")
    decided = plan(config, device=device, **options)
    if nonfinite not in get_args(NonFinite):
        raise InputError(f"nonfinite {printable(nonfinite)!r} is none of {', '.join(get_args(NonFinite))}")
    how = Options(overwrite, io, Path(profile) if profile else None, nonfinite, hash_inputs)
    return execute(decided, Path(out), how, on_event, model_card, stop, signal_received)


def verify(
    out: str | os.PathLike[str],
    *,
    against: ConfigLike | None = None,
    sample: int | None = DEFAULT_SAMPLE,
    seed: int = 0,
    memory: str | int | None = None,
    methods: str | os.PathLike[str] | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Verdict:
    """Re-read a finished output and, on request, compute some of it once more from the inputs.

    Parameters
    ----------
    against
        The config that `out` was made from: a sample of it is recomputed by the torch formulas and compared bit by bit.
    sample
        How many pieces, of a million elements where the method may be cut; None: all of the output, and first the
        content hashes of the inputs, where the manifest records them.
    seed
        Of the choice of the sample; the same pieces for the same seed. (The merge's own seed is the manifest's.)
    memory
        Bound of the process's peak resident memory while it recomputes; default: half of what is free.
    methods
        A Python file with methods of your own.
    on_event
        Called from the calling thread with progress.

    Raises
    ------
    StreammergeError
        If there is no finished merge in `out`, or it was made from another config or other inputs, or the machine
        fails. What is damaged is in the verdict.
    """
    out = Path(out)

    def on_tick(nbytes: int) -> None:
        on_event(Event("verify", {"bytes_read": nbytes}))

    if against is None:
        return verify_files(out, on_tick)
    manifest = manifest_of(out)
    decided = plan(
        against, memory=memory, device="cpu", seed=manifest["seed"], methods=methods, kernels=False
    )
    name = "the config" if isinstance(against, Mapping) else str(against)
    check_made_from(decided, out, manifest, name)
    if sample is None:
        check_contents(decided, out, manifest, on_tick)
    verdict = verify_files(out, on_tick)
    try:
        done = recompute(decided, out, manifest, sample=sample, seed=seed, on_tick=on_tick)
    except InputError:
        if not verdict.problems:
            raise
        return verdict  # which says why the tensors cannot be found
    return replace(verdict, problems=(*verdict.problems, *done.problems), recomputed=done)


def compute_fisher(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    labels: str | None = None,
    examples: int | None = None,
    max_length: int = 512,
    batch_size: int = 16,
    memory: str | int | None = None,
    device: str = "cpu",
    seed: int = 0,
    dtype: str = "float32",
    overwrite: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    stop: threading.Event | None = None,
    signal_received: Callable[[], int | None] = lambda: None,
) -> Computed:
    """Estimate the Fisher diagonal of a model that need not fit in memory; run again, it continues.

    Parameters
    ----------
    model
        A causal language model or a sequence classifier that transformers can build.
    data
        A file of JSON lines: ``text`` or ``input_ids``, and ``label`` where a classifier's own are asked for.
    out
        The store to write.
    labels
        ``sampled``, ``empirical`` or ``exact``; default: exact for a classifier, sampled for a language model.
    examples
        How many are taken, from the first; default: all.
    max_length
        Tokens after which an example is cut.
    batch_size
        Examples that are read and written at a time; the values do not depend on it.
    memory
        Bound of the process's peak resident memory, ``"2GiB"`` or bytes; default: half of what is free.
    device
        ``cpu`` or ``cuda[:N]``.
    seed
        Of the drawn labels.
    dtype
        Of the stored values: ``float32`` or ``bfloat16``.
    overwrite
        Replace `out`, or what an unfinished run left.
    on_event
        Called from the calling thread with progress.

    Raises
    ------
    StreammergeError
        See `streammerge.errors`.
    """
    from streammerge.fisher.compute import Settings, compute_diagonal

    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype {printable(dtype)!r} is none of float32, bfloat16")
    chosen = "cpu" if device == "cpu" else choose_device(device, _bytes(memory), _WORTH_A_GPU)
    settings = Settings(labels, examples, max_length, batch_size, _bytes(memory), chosen, seed, NAMES[dtype])
    return compute_diagonal(
        model,
        data,
        Path(out),
        settings,
        overwrite=overwrite,
        emit=on_event,
        stop=stop,
        signal_received=signal_received,
    )


def compute_grams(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    examples: int | None = None,
    max_length: int = 512,
    batch_size: int = 16,
    memory: str | int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    stop: threading.Event | None = None,
    signal_received: Callable[[], int | None] = lambda: None,
) -> Collected:
    """Collect the Gram matrices of the linear maps in a model's layers, for `regmean`; run again, it continues.

    The parameters are those of `compute_fisher`.

    Raises
    ------
    StreammergeError
        See `streammerge.errors`.
    """
    from streammerge.gram.compute import Settings
    from streammerge.gram.compute import compute_grams as run

    chosen = "cpu" if device == "cpu" else choose_device(device, _bytes(memory), _WORTH_A_GPU)
    settings = Settings(examples, max_length, batch_size, _bytes(memory), chosen)
    return run(
        model,
        data,
        Path(out),
        settings,
        overwrite=overwrite,
        emit=on_event,
        stop=stop,
        signal_received=signal_received,
    )


def choose_device(device: str, memory: int | None, nbytes: int) -> str:
    """Return ``cpu`` or ``cuda:N`` for what a user asked for.

    ``auto`` is the GPU where there is one, `memory` has room for its libraries, and `nbytes` of inputs are worth
    the seconds that it takes to start. Torch is imported only then.
    """
    if device == "cpu":
        return "cpu"
    small = nbytes < _WORTH_A_GPU or (memory is not None and memory < budgets.CUDA_LEAST)
    if device == "auto" and (small or not os.path.exists(_GPU_DRIVER)):
        return "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cuda") or (number and not number.isdecimal()):
        raise InputError(f"device {printable(device)!r} is none of auto, cpu, cuda, cuda:N")
    import torch

    if not torch.cuda.is_available() or int(number or 0) >= torch.cuda.device_count():
        if device == "auto":
            return "cpu"
        raise InputError(f"device {printable(device)!r}: torch finds no such GPU here; use --device cpu")
    return f"cuda:{int(number or 0)}"


def _open_models(config: MergeConfig) -> tuple[list[TensorIndex], TensorIndex | None, list[TensorIndex]]:
    """Open every model once: those merged, the base, and the bases of slices where they are others."""
    opened: dict[str, TensorIndex] = {}

    def get(reference: str) -> TensorIndex:
        if reference not in opened:
            opened[reference] = open_model(reference)
        return opened[reference]

    models = [get(spec.reference) for spec in config.models]
    base = get(config.base_model) if config.base_model is not None else None
    others = {
        part.base.reference: get(part.base.reference)
        for module in config.modules for part in module.slices if part.base is not None
    }  # fmt: skip
    return models, base, [index for index in others.values() if index is not base]


def _open_beside(
    key: str, open_store: Callable[[str], FisherIndex], config: MergeConfig, models: list[TensorIndex]
) -> list[FisherIndex]:
    """Open what lies beside each model under `key`; what was made for another model is refused."""
    stores = []
    for spec, model in zip(config.models, models, strict=True):
        reference = getattr(spec, key)
        if reference is None:
            return []  # refused with the other parameters, by name
        index = open_store(reference)
        check_belongs(index, model, "Fisher diagonal" if key == "fisher" else "store of Gram matrices")
        stores.append(index)
    return stores


def _mixer_bytes(grams: list[FisherIndex]) -> int:
    """Return what is kept of the Gram matrices from one piece of a tensor to the next: fp64, of the largest."""
    return 8 * len(grams) * max((ref.n_elements for index in grams for ref in index.values()), default=0)


def _cpu_reserve(
    models: list[TensorIndex], base: TensorIndex | None, method: Method, torch_only: bool
) -> int:
    wide = any(ref.dtype == "F64" for index in (*models, *([base] if base else [])) for ref in index.values())
    uses_torch = torch_only or method.is_formula or method.gram or wide
    return budgets.TORCH_RESERVE if uses_torch else budgets.KERNEL_RESERVE


def _bytes(size: str | int | None) -> int | None:
    return parse_size(size) if isinstance(size, str) else size
