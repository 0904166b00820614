"""Where every output byte goes: shards, their headers, and each tensor's final offset.

Headers fix every dtype and shape, so all of it is known before any data is read. Inside a shard,
tensors are ordered and the header is spelled as the safetensors library does: a shard is
byte-equal to what its `save_file` writes for the same tensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.checkpoint.weight_names import index_file, weight_file
from streammerge.dtypes import RANK
from streammerge.planning.job import Job


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor's bytes go."""

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

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each shard by its name."""
        return {shard.name: shard.nbytes for shard in self.shards}


def lay_out(jobs: Sequence[Job], shard_size: int, stem: str = "model") -> Layout:
    """Distribute the jobs' tensors, in order, over shards of at most `shard_size` bytes of data, named after `stem`.

    A tensor larger than that has a shard of its own.
    """
    groups: list[list[Job]] = []
    filled = 0
    for job in jobs:
        if not groups or (filled + job.output_bytes > shard_size and groups[-1]):
            groups.append([])
            filled = 0
        groups[-1].append(job)
        filled += job.output_bytes
    shards = []
    slots: dict[int, Slot] = {}
    for number, group in enumerate(groups):
        ordered = sorted(group, key=lambda job: (-RANK[job.dtype], job.name.encode()))
        header = _header(ordered)
        offset = len(header)
        for job in ordered:
            slots[job.ordinal] = Slot(number, offset, job.output_bytes)
            offset += job.output_bytes
        name = weight_file(stem, number, len(groups))
        shards.append(Shard(name, header, offset, tuple(job.ordinal for job in ordered)))
    index = index_file(stem) if len(groups) > 1 else None
    return Layout(tuple(shards), tuple(slots[job.ordinal] for job in jobs), index)


def _header(ordered: Sequence[Job]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for job in ordered:
        end = offset + job.output_bytes
        entries[job.name] = {
            "dtype": job.dtype,
            "shape": list(job.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
