"""Quantised tensors of the models in a merge: which one a job copies, and the jobs that copy its codes and scales."""

from __future__ import annotations

from streammerge.formats.refs import MadeRef, RenamedRef, SourceRef
from streammerge.planning.job import Job
from streammerge.planning.quantize.base import Material
from streammerge.planning.resolve.jobs import is_plain_copy


def decoded(ref: SourceRef) -> SourceRef | None:
    """Return the quantised tensor that a tensor is mainly made of: the one whose codes lie in a file."""
    source = getattr(ref, "source", None)  # a tensor merged from several has none
    while isinstance(ref, MadeRef) and isinstance(source, MadeRef):
        ref, source = source, getattr(source, "source", None)
    return ref if ref.stored_format is not None else None


def copied_from(job: Job, material: Material) -> SourceRef | None:
    """Return the quantised tensor that a job copies as it is; None if it computes anything."""
    if not is_plain_copy(job, material.method):
        return None
    ref = job.sources[0]
    while isinstance(ref, RenamedRef):
        ref = ref.source
    return ref if ref.stored_format is not None and decoded(ref) is ref else None


def named(ref: SourceRef, name: str, stored: str) -> str:
    """Return the name of a stored tensor of `ref` if the tensor itself is called `name`.

    The names of codes and scales begin as the tensor's name does; the rest of the name is kept.
    """
    pairs = enumerate(zip(ref.name, stored, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(ref.name), len(stored)))
    end = ref.name[shared:]
    return name.removesuffix(end) + stored[shared:]


def copies(ref: SourceRef, name: str, material: Material) -> list[Job]:
    """Return the jobs that copy all stored tensors of a quantised tensor, as they lie in its files."""
    coded = {
        (tensor.path, tensor.name): tensor
        for index in material.indexes.values()
        for tensor in (index.coded.get(part.name) for part in ref.parts)
        if tensor is not None
    }
    return [copy_job(coded[part.path, part.name], named(ref, name, part.name)) for part in ref.parts]


def copy_job(ref: SourceRef, name: str) -> Job:
    """Return a job that copies a stored tensor under a name; its ordinal is still to be set."""
    return Job(0, name, ref.dtype, ref.shape, "copy", (ref,), None, {})
