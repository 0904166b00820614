"""Lays out the output: shards, their headers, and each tensor's final offset.

Headers fix every dtype and shape, so all of it is known before any data is read. Inside a shard,
tensors are ordered and the header is spelled as the safetensors library does: a shard is
byte-equal to what its `save_file` writes for the same tensors.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

from streammerge.checkpoint.weight_names import index_file, weight_file
from streammerge.dtypes import RANK
from streammerge.formats.safetensors import SUFFIX
from streammerge.planning.job import Job
from streammerge.tensors.encoders.base import Stored

Key = tuple[int, int]
"""A tensor of the output: the ordinal of its job, and its number among the job's parts."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of the bytes of one tensor of the output: of one part of a job."""

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
    parts: tuple[Key, ...]
    """Its tensors in file order."""


@dataclass(frozen=True)
class Layout:
    """All output files and the slots of every job, by ordinal: one for each of its parts."""

    shards: tuple[Shard, ...]
    slots: tuple[tuple[Slot, ...], ...]
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


class Places:
    """Finds the tensor that a byte of a layout belongs to."""

    def __init__(self, layout: Layout) -> None:
        self._by_shard = [
            sorted(
                (layout.slots[job][part].offset, (job, part))
                for job, part in shard.parts
                if layout.slots[job][part].nbytes
            )
            for shard in layout.shards
        ]

    def find(self, shard: int, offset: int) -> tuple[int, Key]:
        """Return where the tensor at an offset of a shard begins, and which it is."""
        places = self._by_shard[shard]
        return places[bisect_right(places, offset, key=itemgetter(0)) - 1]


def lay_out(jobs: Sequence[Job], shard_size: int, stem: str = "model", folders: Sequence[str] = ()) -> Layout:
    """Distribute the jobs' tensors, in order, over shards of at most `shard_size` bytes of data, named after `stem`.

    The parts of a job lie in one shard. A tensor larger than a shard has one of its own, and so have all tensors ``FOLDER/name`` of one of the `folders`
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
    slots: dict[Key, Slot] = {}
    n_own = len(groups)
    names = [weight_file(stem, number, n_own) for number in range(n_own)]
    names += [f"{folder}/{weight_file('model')}" for folder, own in parted.items() if own]
    groups += [own for own in parted.values() if own]
    for number, (name, group) in enumerate(zip(names, groups, strict=True)):
        shard, placed = _shard(number, name, group, len(folder_of(name)), {})
        shards.append(shard)
        slots |= placed
    index = index_file(stem) if n_own > 1 else None
    return Layout(tuple(shards), _by_job(jobs, slots), index)


def lay_out_file(jobs: Sequence[Job], name: str, metadata: Mapping[str, str]) -> Layout:
    """Place the tensors of all jobs in one file, in whose header `metadata` stands."""
    shard, slots = _shard(0, name, jobs, 0, metadata)
    return Layout((shard,), _by_job(jobs, slots), single_file=True)


def _by_job(jobs: Sequence[Job], slots: Mapping[Key, Slot]) -> tuple[tuple[Slot, ...], ...]:
    return tuple(tuple(slots[job.ordinal, i] for i in range(len(job.parts))) for job in jobs)


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
) -> tuple[Shard, dict[Key, Slot]]:
    """Return a shard, and the slots of its tensors.

    Parameters
    ----------
    cut
        Characters at the beginning of a job's name that the tensor's name in the file is without.
    """
    parts = {(job.ordinal, i): part for job in jobs for i, part in enumerate(job.parts)}
    ordered = sorted(parts, key=lambda key: (-RANK[parts[key].dtype], parts[key].name.encode()))
    header = _header([parts[key] for key in ordered], cut, metadata)
    offset = len(header)
    slots: dict[Key, Slot] = {}
    for key in ordered:
        slots[key] = Slot(number, offset, parts[key].nbytes)
        offset += parts[key].nbytes
    return Shard(name, header, offset, tuple(ordered)), slots


def _header(ordered: Sequence[Stored], cut: int, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for part in ordered:
        end = offset + part.nbytes
        entries[part.name[cut:]] = {
            "dtype": part.dtype,
            "shape": list(part.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
