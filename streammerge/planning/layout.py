"""Lays out the output: shards, their headers, and each tensor's final offset.

Headers fix every dtype and shape, so all of it is known before any data is read. Inside a shard,
tensors are ordered and the header is spelled as the safetensors library does: a shard is
byte-equal to what its `save_file` writes for the same tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streammerge.checkpoint.weight_names import index_file, weight_file
from streammerge.dtypes import RANK
from streammerge.formats.safetensors import SUFFIX
from streammerge.planning.job import Job


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one tensor's bytes."""

    shard: int
    offset: int
    """Absolute byte offset in the shard's file."""
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One output file."""

    name: str
    header: bytes
    """The first bytes of the file: length, JSON, padding."""
    nbytes: int
    """Size of the whole file."""
    jobs: tuple[int, ...]
    """Ordinals of its tensors, in file order."""


@dataclass(frozen=True)
class Layout:
    """All output files and the slot of every job, by ordinal."""

    shards: tuple[Shard, ...]
    slots: tuple[Slot, ...]
    index: str | None = None
    """Name of the file that leads from tensors to shards; None where there is one shard."""
    single_file: bool = False
    """Whether the output is one file, whatever its name, and not a directory."""

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each shard by its name."""
        return {shard.name: shard.nbytes for shard in self.shards}


def lay_out(jobs: Sequence[Job], shard_size: int, stem: str = "model", folders: Sequence[str] = ()) -> Layout:
    """Distribute the jobs' tensors, in order, over shards of at most `shard_size` bytes of data, named after `stem`.

    A tensor larger than that has a shard of its own, and so have all tensors ``FOLDER/name`` of one of the `folders`
    together, whatever their size: the libraries that read such folders look for one file.
    """
    groups: list[list[Job]] = []
    filled = 0
    parted = {folder: [job for job in jobs if job.name.startswith(f"{folder}/")] for folder in folders}
    apart = {job.ordinal for own in parted.values() for job in own}
    for job in (job for job in jobs if job.ordinal not in apart):
        if not groups or (filled + job.output_bytes > shard_size and groups[-1]):
            groups.append([])
            filled = 0
        groups[-1].append(job)
        filled += job.output_bytes
    shards = []
    slots: dict[int, Slot] = {}
    n_own = len(groups)
    names = [weight_file(stem, number, n_own) for number in range(n_own)]
    names += [f"{folder}/{weight_file('model')}" for folder, own in parted.items() if own]
    groups += [own for own in parted.values() if own]
    for number, (name, group) in enumerate(zip(names, groups, strict=True)):
        shard, placed = _shard(number, name, group, len(folder_of(name)), {})
        shards.append(shard)
        slots |= placed
    index = index_file(stem) if n_own > 1 else None
    return Layout(tuple(shards), tuple(slots[job.ordinal] for job in jobs), index)


def lay_out_file(jobs: Sequence[Job], name: str, metadata: Mapping[str, str]) -> Layout:
    """Place the tensors of all jobs in one file, in whose header `metadata` stands."""
    shard, slots = _shard(0, name, jobs, 0, metadata)
    return Layout((shard,), tuple(slots[job.ordinal] for job in jobs), single_file=True)


def folder_of(name: str) -> str:
    """Return what the names of a shard's tensors begin with in the plan and not in the file.

    >>> folder_of("2_Dense/model.safetensors"), folder_of("model.safetensors")
    ('2_Dense/', '')
    """
    return name[: name.rfind("/") + 1]


def is_shard(name: str, folders: Sequence[str]) -> bool:
    """Return whether a file of an output holds merged tensors; what lies in folders other than `folders` is a copy."""
    folder = folder_of(name)
    return name.endswith(SUFFIX) and (not folder or folder[:-1] in folders)


def _shard(
    number: int, name: str, jobs: Sequence[Job], cut: int, metadata: Mapping[str, str]
) -> tuple[Shard, dict[int, Slot]]:
    """Return a shard, and the slots of its jobs by their ordinals.

    Parameters
    ----------
    cut
        Characters at the beginning of a job's name that the tensor's name in the file is without.
    """
    ordered = sorted(jobs, key=lambda job: (-RANK[job.dtype], job.name.encode()))
    header = _header(ordered, cut, metadata)
    offset = len(header)
    slots: dict[int, Slot] = {}
    for job in ordered:
        slots[job.ordinal] = Slot(number, offset, job.output_bytes)
        offset += job.output_bytes
    return Shard(name, header, offset, tuple(job.ordinal for job in ordered)), slots


def _header(ordered: Sequence[Job], cut: int, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for job in ordered:
        end = offset + job.output_bytes
        entries[job.name[cut:]] = {
            "dtype": job.dtype,
            "shape": list(job.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
