"""Lay out the output: shards, their headers, and each tensor's final offset.

The inputs' headers determine every dtype and shape, so the layout is known before any data is read. The order of
tensors in a shard and the spelling of its header are those of the safetensors library: a shard has the bytes that
`save_file` writes for the same tensors.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from operator import itemgetter

from streammerge.checkpoint.weight_names import index_file, weight_file
from streammerge.dtypes import RANK
from streammerge.formats.safetensors import SUFFIX
from streammerge.planning.job import Job
from streammerge.records import dataclass
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
    indexes: tuple[str, ...] = ()
    """Paths of the files that lead from tensors to shards, one for each folder with several shards."""
    single_file: bool = False
    """Whether the output is one file, whatever its name, and not a directory."""
    beside: str = ""
    """The name of a file into which the tensors are copied in the end; its size is at most that of the shards."""
    adjacent: bool = False
    """Whether the parts of a job lie one after the other, for jobs that are written whole, from the first byte on. The
    header is that of the usual order all the same: it identifies the output, and nobody reads such a file by it."""

    @property
    def last(self) -> int | None:
        """The only shard of the output's own folder, whose presence marks a finished model; None without an only one."""
        own = [number for number, shard in enumerate(self.shards) if not folder_of(shard.name)]
        return own[0] if len(own) == 1 else None

    def shards_beside(self, index: str) -> tuple[Shard, ...]:
        """Return the shards that an index leads to."""
        return tuple(shard for shard in self.shards if folder_of(shard.name) == folder_of(index))

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def sizes(self) -> dict[str, int]:
        """Most bytes of each file on the disk, by its name: the shards, and the copy."""
        final = {self.beside: self.nbytes} if self.beside else {}
        return {shard.name: shard.nbytes for shard in self.shards} | final


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
        """Return the beginning of the tensor at an offset of a shard, and the tensor itself."""
        places = self._by_shard[shard]
        return places[bisect_right(places, offset, key=itemgetter(0)) - 1]


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of the output with weights, in the form that the library expects."""

    name: str = ""
    """Empty: the output itself."""
    stem: str = "model"
    """Beginning of the names of its files."""
    one_file: bool = False
    """Whether the library looks for a single file, whatever its size."""

    @property
    def prefix(self) -> str:
        """Beginning of the names of its files and tensors in the plan."""
        return f"{self.name}/" if self.name else ""


def lay_out(
    jobs: Sequence[Job],
    shard_size: int,
    folders: Sequence[Folder] = (Folder(),),
    beside: str = "",
    *,
    adjacent: bool = False,
) -> Layout:
    """Distribute the jobs' tensors, in order, over shards of at most `shard_size` bytes of data.

    The parts of a job lie in one shard. A tensor larger than a shard has one of its own. The tensors ``FOLDER/name`` of
    one of the `folders` have shards and an index there; all others belong to the folder without a name. `beside` names
    the file into which all tensors are copied in the end; nobody else reads the shards then, and with `adjacent` the parts
    of each job lie together.
    """
    own: dict[str, list[Job]] = {folder.name: [] for folder in folders}
    for job in jobs:
        own[next((one.name for one in folders if one.name and job.name.startswith(one.prefix)), "")].append(
            job
        )
    shards: list[Shard] = []
    slots: dict[Key, Slot] = {}
    indexes = []
    for folder in folders:
        mine = own[folder.name]
        groups = [mine] if folder.one_file and mine else _cut(mine, shard_size)
        for number, group in enumerate(groups):
            name = folder.prefix + weight_file(folder.stem, number, len(groups))
            shard, placed = _shard(len(shards), name, group, len(folder.prefix), {}, adjacent=adjacent)
            shards.append(shard)
            slots |= placed
        indexes += [folder.prefix + index_file(folder.stem)] if len(groups) > 1 else []
    return Layout(tuple(shards), _by_job(jobs, slots), tuple(indexes), False, beside, adjacent)


def _cut(jobs: Sequence[Job], shard_size: int) -> list[list[Job]]:
    """Return the jobs of each shard."""
    groups: list[list[Job]] = []
    filled = 0
    for job in jobs:
        if not groups or filled + job.output_bytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(job)
        filled += job.output_bytes
    return groups


def lay_out_file(jobs: Sequence[Job], name: str, metadata: Mapping[str, str]) -> Layout:
    """Place the tensors of all jobs in one file; its header contains `metadata`."""
    shard, slots = _shard(0, name, jobs, 0, metadata)
    return Layout((shard,), _by_job(jobs, slots), single_file=True)


def _by_job(jobs: Sequence[Job], slots: Mapping[Key, Slot]) -> tuple[tuple[Slot, ...], ...]:
    return tuple(tuple(slots[job.ordinal, i] for i in range(len(job.parts))) for job in jobs)


def folder_of(name: str) -> str:
    """Return the prefix that the names of a shard's tensors have in the plan but not in the file.

    >>> folder_of("2_Dense/model.safetensors"), folder_of("model.safetensors")
    ('2_Dense/', '')
    """
    return name[: name.rfind("/") + 1]


def is_shard(name: str, folders: Sequence[str]) -> bool:
    """Return whether a file of an output is a shard; files in folders other than `folders` are copies."""
    folder = folder_of(name)
    return name.endswith(SUFFIX) and (not folder or folder[:-1] in folders)


def _shard(
    number: int,
    name: str,
    jobs: Sequence[Job],
    cut: int,
    metadata: Mapping[str, str],
    *,
    adjacent: bool = False,
) -> tuple[Shard, dict[Key, Slot]]:
    """Return a shard, and the slots of its tensors.

    Parameters
    ----------
    cut
        Number of characters at the beginning of a job's name that the tensor's name in the file lacks.
    """
    parts = {(job.ordinal, i): part for job in jobs for i, part in enumerate(job.parts)}
    ordered = sorted(parts, key=lambda key: place_in_file(parts[key]))
    header = header_of([parts[key] for key in ordered], cut, metadata)
    ordered = list(parts) if adjacent else ordered
    offset = len(header)
    slots: dict[Key, Slot] = {}
    for key in ordered:
        slots[key] = Slot(number, offset, parts[key].nbytes)
        offset += parts[key].nbytes
    return Shard(name, header, offset, tuple(ordered)), slots


def place_in_file(part: Stored) -> tuple[int, bytes]:
    """Return a key by which the safetensors library orders the tensors of a file."""
    return -RANK[part.dtype], part.name.encode()


def header_of(ordered: Sequence[Stored], cut: int = 0, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the beginning of a file of tensors in this order: length, JSON, padding."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
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
