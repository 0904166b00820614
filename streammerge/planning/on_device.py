"""Which tensors are merged in the memory of a GPU: those that it reads as they are stored, and computes all of."""

from __future__ import annotations

from streammerge.algebra.extent import Extent
from streammerge.backends.base import Backend
from streammerge.formats.refs import Ref
from streammerge.methods.registry import Method
from streammerge.planning.backend import why_unfused
from streammerge.planning.job import Job
from streammerge.planning.needs import likeness, tensor_context_of
from streammerge.tensors.coded.kinds import is_coded
from streammerge.tensors.stacked import all_leaves

DEVICE_BYTES = 1 << 20
"""Least bytes of the inputs of a tensor; the CPU has merged smaller ones before a GPU has begun."""


LONGEST_ROW = 1 << 16
"""Elements of a row that kernels see whole; the CPU has better ways for longer ones."""


def goes_to_device(job: Job, extent: Extent) -> bool:
    """Return whether the inputs of a job are read by ranges, elements or codes, and its output is written by ranges.

    `extent` is that of its arithmetic.
    """
    return (
        job.kind == "merge"
        and not (extent == Extent.ROW and job.row_length > LONGEST_ROW)
        and job.encoder is None
        and job.computed_dtype == job.dtype
        and job.matrix is None
        and not job.grams
        and not job.has_stages
        and not job.waits
        and not job.shared
        and job.input_bytes >= DEVICE_BYTES
        and all(_is_brought(leaf) for ref in job.held for leaf in all_leaves(ref))
        and not any(ref.is_whole for ref in job.inputs)
        and all(ref.dtype in ("F32", "F16", "BF16") for ref in job.held)
    )


def _is_brought(ref: Ref) -> bool:
    """Return whether ranges of a tensor are read as elements or as codes, without a buffer of this process."""
    return (not ref.scratch_bytes or is_coded(ref)) and not ref.chunk_elements


def is_fused(job: Job, method: Method, backend: Backend) -> bool:
    """Return whether a backend computes a job's rule and all statistics before it on its device."""
    return why_not_fused(job, method, backend) is None


def why_not_fused(job: Job, method: Method, backend: Backend) -> str | None:
    """Return why a backend does not, in a few words; None if it does. The answer is cached."""
    key = (backend.name, *likeness(job, method), bool(job.fishers), job.base is not None, job.n_models)
    known = method.known_fused
    if key not in known:
        known[key] = why_unfused(backend, method, tensor_context_of(job), job.parameters)
    return known[key]
