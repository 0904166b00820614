"""Choose the backend of a merge and of each tensor, and bound the memory that backends need."""

from __future__ import annotations

import os
from collections.abc import Sequence

from streammerge.backends.base import Backend
from streammerge.backends.cpu.backend import CPU
from streammerge.backends.registry import BACKENDS
from streammerge.backends.torch.backend import CUDA, TORCH
from streammerge.checkpoint.companions import CompanionIndex
from streammerge.checkpoint.index import TensorIndex
from streammerge.errors import InputError, printable
from streammerge.methods.registry import Method
from streammerge.planning.job import Job
from streammerge.planning.needs import likeness, tensor_context_of

GPU_DRIVER = "/dev/nvidiactl"
WORTH_A_GPU = 8_000_000_000
"""Size of inputs in bytes; smaller merges finish on the CPU before a GPU has started."""
CUDA_LEAST = CUDA.reserve + (512 << 20)
"""Memory in bytes; with less, a GPU is used only on request."""


def choose_device(device: str, memory: int | None, nbytes: int) -> str:
    """Return the device that a user asked for: ``cpu``, ``cuda:N``, or the kind of a registered backend.

    ``auto`` selects a GPU if there is one, if `memory` suffices for its libraries, and if `nbytes` of inputs justify
    the seconds that it takes to start. Torch is imported only then.

    Raises
    ------
    InputError
        If there is no such device.
    """
    kind, _, number = device.partition(":")
    if device == "auto":
        small = nbytes < WORTH_A_GPU or (memory is not None and memory < CUDA_LEAST)
        gpu = None if small or not os.path.exists(GPU_DRIVER) or CUDA.find is None else CUDA.find(0)
        return CPU.device if gpu is None else gpu
    backend = _on(kind)
    if backend is None or (number and (backend.find is None or not number.isdecimal())):
        kinds = ", ".join(dict.fromkeys(backend.device for backend in BACKENDS.values()))
        raise InputError(f"device {printable(device)!r} is not one of auto, {kinds}, cuda:N")
    found = kind if backend.find is None else backend.find(int(number or 0))
    if found is None:
        raise InputError(f"device {printable(device)!r}: this machine has no such device; use --device cpu")
    return found


def backend_on(device: str, kernels: bool | None) -> Backend:
    """Return the backend of a chosen device; with `kernels` False, torch's formulas instead of compiled kernels."""
    chosen = _on(device.partition(":")[0])
    assert chosen is not None
    return TORCH if chosen.compiled and kernels is False else chosen


def _on(kind: str) -> Backend | None:
    """Return the first backend registered for a kind of device."""
    return next((backend for backend in BACKENDS.values() if backend.device == kind), None)


def backend_of(job: Job, method: Method, chosen: Backend) -> Backend:
    """Return the backend that computes a job: the `chosen` one, or torch if that has no kernels for the job."""
    if job.matrix is not None:
        return TORCH  # a GPU's decompositions have other last bits
    if chosen.formulas or not _takes_formulas(job, method):
        return chosen
    return TORCH


def reserve_of(chosen: Backend, method: Method, models: Sequence[TensorIndex]) -> int:
    """Return the bytes that the process needs for the backends that a merge of some models may use."""
    if chosen.formulas or not (
        method.is_formula
        or method.gram
        or method.matrices
        or method.origin != "built in"
        or any(map(_has_fp64, models))
    ):
        return chosen.reserve
    return max(chosen.reserve, TORCH.reserve)


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
