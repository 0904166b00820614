"""Choose the backend of a merge and of each tensor, and bound the memory that backends need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from streammerge.algebra.rules import ranked
from streammerge.backends.base import Backend
from streammerge.backends.cpu.backend import CPU
from streammerge.backends.gpu.backend import FUSED
from streammerge.backends.registry import BACKENDS
from streammerge.backends.torch.backend import TORCH
from streammerge.checkpoint.companions import CompanionIndex
from streammerge.checkpoint.index import TensorIndex
from streammerge.errors import InputError, printable
from streammerge.machine import gpus
from streammerge.methods.registry import REQUIRED, Method, Parameter
from streammerge.methods.tensor_context import TensorContext
from streammerge.planning.device import DECODING, UNKNOWN_COST, Host, Volume, Workload, weigh
from streammerge.planning.job import Job
from streammerge.planning.needs import likeness, tensor_context_of
from streammerge.units import format_at_least

ASKED, NO_GPU = "asked for", "no GPU is here"
"""The reasons of a device that was not weighed."""
RANKS_RATE = 3.0
"""GB per second that a GPU is expected to merge by ranks in rows, cautiously, until that is measured: rows are sorted."""
CUDA_LEAST = FUSED.reserve + (512 << 20)
"""Memory in bytes; with less, a GPU is used only on request."""


class Device(NamedTuple):
    """A chosen device."""

    name: str
    """``cpu``, ``cuda:N``, or the kind of a registered backend."""
    reason: str
    """Why it was chosen, in a few words."""


def find_device(
    device: str, memory: int | None, workload: Callable[[], Workload], host: Callable[[], Host]
) -> Device:
    """Return the device that a user asked for; for ``auto`` the one that is expected to finish first.

    Torch is imported only if a GPU is worth it.

    Parameters
    ----------
    memory
        Bytes of ``--memory``; None: not given.
    workload, host
        What is to be done and what bounds it; asked only for ``auto`` where there is a GPU.

    Raises
    ------
    InputError
        If there is no such device.
    """
    if device != "auto":
        return Device(choose_device(device), ASKED)
    if not gpus():
        return Device(CPU.device, NO_GPU)
    if memory is not None and memory < CUDA_LEAST:
        return Device(CPU.device, f"a GPU needs at least --memory {format_at_least(CUDA_LEAST)}")
    gpu, reason = weigh(workload(), host())
    if not gpu:
        return Device(CPU.device, reason)
    try:
        found = _first_gpu()
    except InputError as error:
        return Device(CPU.device, str(error).partition(": ")[0])
    if found is None:
        return Device(CPU.device, "its driver finds no GPU, though one is here")
    return Device(found, reason)


def _first_gpu() -> str | None:
    """Return the first GPU, None if the driver finds none; an InputError says that it is too old, or does not start."""
    backend = _on("cuda")
    return None if backend is None or backend.find is None else backend.find(0)


def choose_device(device: str, memory: int | None = None) -> str:
    """Return the device that a user asked for: ``cpu``, ``cuda:N``, or the kind of a registered backend.

    ``auto`` is a GPU if there is one and `memory` suffices for its libraries: networks are always faster there.

    Raises
    ------
    InputError
        If there is no such device.
    """
    kind, _, number = device.partition(":")
    if device == "auto":
        small = memory is not None and memory < CUDA_LEAST
        with suppress(InputError):
            gpu = None if small or not gpus() else _first_gpu()
            return CPU.device if gpu is None else gpu
        return CPU.device
    backend = _on(kind)
    if backend is None or (number and (backend.find is None or not number.isdecimal())):
        kinds = ", ".join(dict.fromkeys(backend.device for backend in BACKENDS.values()))
        raise InputError(f"device {printable(device)!r} is not one of auto, {kinds}, cuda:N")
    found = kind if backend.find is None else backend.find(int(number or 0))
    if found is None:
        raise InputError(f"device {printable(device)!r}: this machine has no such device; use --device cpu")
    return found


def has_bits_of_device(method: Method) -> bool:
    """Return whether the last bits may be a GPU's.

    They may in matrix products and decompositions of torch, and in formulas that are not ours.
    """
    return method.origin != "built in" or method.gram or method.matrices


def workload_of(method: Method, n_models: int, volume: Volume) -> Workload:
    """Return what a merge of inputs of a size costs, for each GB of them that is read."""
    cost = UNKNOWN_COST if method.cost is None else method.cost
    read, values = max(1, volume.nbytes) / 1e9, max(1, volume.values) / 1e9
    seconds = values * cost + volume.decoded * DECODING
    return Workload(method.name, volume.nbytes, seconds / read, _gpu_rate(method, n_models, read / values))


class Way(NamedTuple):
    """Where a method is computed if a merge asks for a GPU."""

    place: Literal["kernels", "torch", "CPUs"]
    why: str = ""
    """Why not by kernels, in a few words."""


def way_of(
    method: Method, n_models: int, parameters: Mapping[str, Any] | None = None, gpu: Backend = FUSED
) -> Way:
    """Return where a method merges the matrices of a model; parameters that are not given are typical ones."""
    if method.matrices:
        return Way("torch", "its decompositions are torch's")
    if method.is_formula:
        return Way("torch", "it is a formula of torch")
    if method.gram:
        return Way("torch", "its matrix products are torch's")
    context, typical = _typical_tensor(method, n_models)
    why = why_unfused(gpu, method, context, {**typical, **(parameters or {})})
    return Way("kernels") if why is None else Way("CPUs", why)


def _gpu_rate(method: Method, n_models: int, share: float) -> float | None:
    """Return the GB per second of what is read that a GPU merges by a method; None if most of it would stay on the
    CPUs, or it is not known, as of decompositions.

    The bus limits kernels, which are sent what is read; torch and ranks are limited by the values, of which what is read
    is a `share`.
    """
    gpu, _ = backend_on("cuda", None)
    place = way_of(method, n_models, gpu=gpu).place
    if method.matrices:
        return None
    if gpu.open_lane is None or place == "torch":
        by_torch = formulas_of(gpu)
        return None if by_torch.on_host else by_torch.rate * share
    if place == "CPUs":
        return None
    by_ranks = ranked(method.rule(*_typical_tensor(method, n_models)))
    return min(gpu.rate, RANKS_RATE * share) if by_ranks else gpu.rate


def _typical_tensor(method: Method, n_models: int) -> tuple[TensorContext, dict[str, Any]]:
    """Return a matrix of a model, and typical parameters."""
    has_base = method.base in ("required", "optional")
    context = TensorContext(n_models, shape=(4096, 4096), has_base=has_base, fisher=method.fisher, gram=False)
    return context, {name: _typical(one, n_models) for name, one in method.parameters.items()}


def _typical(parameter: Parameter, n_models: int) -> Any:
    value = 0.5 if parameter.default is REQUIRED else parameter.default
    return (value,) * n_models if parameter.per_model else value


NO_RULE, NO_STATISTICS = "its rule has no kernel on GPUs", "its statistics have no kernels on GPUs"


def why_unfused(
    backend: Backend, method: Method, context: TensorContext, parameters: Mapping[str, Any]
) -> str | None:
    """Return why a backend does not compute a method's rule and all statistics before it on its device; None if it does."""
    rule = method.rule(context, parameters)
    if not backend.fuses(rule, ()):
        return NO_RULE
    rounds = method.rounds(context, parameters)
    calls = [call for statistics in rounds for statistic in statistics for call in statistic.calls()]
    return None if backend.fuses(rule, calls) else NO_STATISTICS


def backend_on(device: str, kernels: bool | None) -> tuple[Backend, str | None]:
    """Return the backend of a chosen device, and what the user is told of it, if anything.

    With `kernels` False, torch's formulas take the place of compiled kernels.
    """
    chosen = _on(device.partition(":")[0])
    assert chosen is not None
    if chosen.compiled and kernels is False:
        return rest_of(chosen), None
    missing = chosen.lacks()
    return (chosen, None) if missing is None else (rest_of(chosen), missing)


def rest_of(backend: Backend) -> Backend:
    """Return the backend of what a backend does not compute: torch on the CPU where its own is not installed."""
    rest = backend.rest or TORCH
    return rest if rest.find is None or rest.find(0) is not None else TORCH


def formulas_of(backend: Backend) -> Backend:
    """Return the backend that computes formulas, products and decompositions where a backend is chosen."""
    return backend if backend.formulas else rest_of(backend)


def _on(kind: str) -> Backend | None:
    """Return the first backend registered for a kind of device."""
    return next((backend for backend in BACKENDS.values() if backend.device == kind), None)


def backend_of(job: Job, method: Method, chosen: Backend) -> Backend:
    """Return the backend that computes a job: the `chosen` one, or torch if that has no kernels for the job."""
    return formulas_of(chosen) if _takes_formulas(job, method) else chosen


def reserve_of(
    chosen: Backend, method: Method, models: Sequence[TensorIndex], *, scaled: bool = False
) -> int:
    """Return the bytes that the process needs for the backends that a merge of some models may use.

    Parameters
    ----------
    scaled
        Whether the merged task vectors are scaled by layer.
    """
    if chosen.formulas or not (
        method.is_formula
        or method.gram
        or method.matrices
        or method.origin != "built in"
        or (scaled and not method.scales)
        or any(map(_has_fp64, models))
    ):
        return chosen.reserve
    return rest_of(chosen).reserve + chosen.reserve - CPU.reserve


def operator_bytes(grams: Sequence[CompanionIndex]) -> int:
    """Return the size of the largest Gram matrices in fp64, in bytes; they are kept between the pieces of a tensor."""
    return 8 * len(grams) * max((ref.n_elements for index in grams for ref in index.values()), default=0)


def _takes_formulas(job: Job, method: Method) -> bool:
    """Return whether a job needs torch: a plain formula, a rule without a kernel, or fp64."""
    if job.kind == "merge":
        wide = any(ref.dtype == "F64" for ref in (*job.inputs, *job.fishers))
        return method.is_formula or wide or job.dtype == "F64" or not _has_kernel(job, method)
    return job.dtype != job.sources[0].dtype and "F64" in (job.dtype, job.sources[0].dtype)


def _has_kernel(job: Job, method: Method) -> bool:
    """Return whether a kernel applies the rule of a job; the answer is cached, since every piece asks."""
    key = (*likeness(job, method), bool(job.fishers), job.base is not None, job.n_models)
    known = method.known_rules
    if key not in known:
        known[key] = type(method.rule(tensor_context_of(job), job.parameters))
    return CPU.applies(known[key])


def _has_fp64(index: TensorIndex) -> bool:
    return any(ref.dtype == "F64" for ref in index.values())
