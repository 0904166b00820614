"""Checkpoints of ``torch.distributed.checkpoint`` (DCP): a ``.metadata``, and the files of each process's chunks.

A chunk is stored as ``torch.save`` writes it, at an offset of a file, or in a safetensors file. Megatron's
``torch_dist`` is the same with an additional ``common.pt`` and ``metadata.json``. The metadata is checked against the
files: names, dtypes, shapes, and that the chunks of a tensor hold each element exactly once.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any

from streammerge.dtypes import BITS
from streammerge.formats.dcp_metadata import Metadata, Place, Sizes, Stored, parse_metadata
from streammerge.formats.refs import SourceRef, TensorRef
from streammerge.formats.refusing import AGAIN, Refused, Source, need
from streammerge.formats.registry import Contents, opens
from streammerge.formats.safetensors import read_header
from streammerge.formats.sharded_refs import Chunk, ShardedRef
from streammerge.formats.strided_refs import StridedRef
from streammerge.formats.torch_file import ref_of, run_program
from streammerge.formats.torch_names import Tensor
from streammerge.io import volumes
from streammerge.io.files import bad, quoted, reading
from streammerge.io.stamp import FileStamp
from streammerge.io.strict_json import parse_object
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

METADATA = ".metadata"
MEGATRON = "metadata.json"
"""The file in which Megatron declares the format of a directory."""
_SUFFIX = ".distcp"
_SHARDING = "DCP_SHARDING_INFO"
"""The metadata key of a safetensors file whose JSON states which chunk of a tensor the file holds."""
_OF_TRAINING = late_pattern(
    r"(?:[^.]+\.)?(?:optimizers?|optim)\.(?:state|param_groups|param_state)\..*"
    r"|(?:optimizers?|optim|lr_schedulers?|scheduler|dataloader|train_state|rng_state|rng)(?:\.|/|$).*",
    re.ASCII | re.DOTALL,
)
"""Names of entries that are needed only to resume training."""
_MOST_COMPARED = 4_000_000
"""Most pairs of chunks of one tensor to compare; regular grids take far fewer."""


@dataclass(frozen=True, slots=True)
class _Item:
    """One chunk to be read."""

    name: str
    dtype: str
    begins: Sizes
    sizes: Sizes
    place: Place


@dataclass
class _File:
    """The information collected about a file."""

    path: str
    digest: hashlib.blake2b = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    """Digest of the headers of all chunks read from the file."""
    blobs: dict[int, tuple[Mapping[str, TensorRef], Mapping[str, Any]]] = field(default_factory=dict)
    """By offset of a safetensors part: its tensors, and the first indexes of their chunks."""


@opens(METADATA)
def open_dcp(path: str | os.PathLike[str]) -> Contents:
    """Return the content of the checkpoint of a ``.metadata``; reads the header of every chunk, but no tensor.

    The state of optimizers and of the training, and entries that are not tensors, are left out.

    Raises
    ------
    ModelError
        If it breaks a rule of the format, a chunk is missing or contradicts the metadata, or chunks overlap.
    WorldError
        If the machine cannot read it.
    """
    path = os.fspath(path)
    directory = os.path.dirname(path)
    backend = _check_megatron(directory)
    with reading(path) as (fd, status):
        try:
            metadata, raw = parse_metadata(Source(fd, status.st_size, path))
            taken, left_out = _split(metadata)
            items = {name: list(_items(name, metadata)) for name in taken}
        except Refused as refusal:
            raise bad(path, str(refusal)) from None
        stamp = FileStamp.of(path, status, raw)
    del raw
    by_file: dict[str, list[_Item]] = {}
    for item in (item for some in items.values() for item in some):
        by_file.setdefault(item.place.file, []).append(item)
    refs: dict[tuple[str, Sizes], TensorRef | StridedRef] = {}
    stamps = []
    for name in sorted(by_file):
        stamps.append(_read_file(path, os.path.join(directory, name), by_file[name], refs))
    tensors = [_put_together(name, metadata.tensors[name], items[name], refs) for name in taken]
    tensors.sort(key=lambda ref: (ref.stored.path, ref.stored.offset, ref.name))
    return Contents({ref.name: ref for ref in tensors}, stamp, left_out, more_stamps=(*backend, *stamps))


def _check_megatron(directory: str) -> list[FileStamp]:
    """Refuse Megatron formats other than ``torch_dist``; return the stamp of the file that declares the format."""
    path = os.path.join(directory, MEGATRON)
    if not volumes.lexists(path):
        return []
    with reading(path) as (fd, status):
        need_small = status.st_size <= 1 << 16
        raw = Source(fd, status.st_size, path).read(0, status.st_size, "it") if need_small else b"{}"
    backend = parse_object(raw, path, "it", "finite").get("sharded_backend", "torch_dist")
    if backend != "torch_dist":
        raise bad(path, f"Megatron's format {quoted(str(backend), 40)}: only torch_dist is read")
    return [FileStamp.of(path, status, raw)]


def _split(metadata: Metadata) -> tuple[list[str], tuple[str, ...]]:
    """Return the names of the weights, and notes that count all other entries by the first component of their names."""
    taken = [name for name in metadata.tensors if not _OF_TRAINING.fullmatch(name)]
    need(len(taken) > 0, "holds no weights, only the state of a training")
    left = [name for name in metadata.tensors if _OF_TRAINING.fullmatch(name)]
    left += [name for name in metadata.others if not name.rpartition(".")[2].startswith("_extra_state")]
    counts = Counter(re.split(r"[./]", name, maxsplit=1)[0] for name in left)
    return taken, tuple(start if n == 1 else f"{start} ({n} entries)" for start, n in counts.items())


def _items(name: str, metadata: Metadata) -> Iterator[_Item]:
    """Yield the non-empty chunks of a tensor, each once; refuse them unless they form the whole tensor."""
    stored, where = metadata.tensors[name], f"tensor {quoted(name)}"
    odd = name in metadata.reformulated
    need(not odd, f"{where}: Megatron stores it in another shape than its own: save it with a newer Megatron")
    countable = math.prod(size or 1 for size in stored.shape) * BITS[stored.dtype] < 2**63
    need(countable, f"{where}: its shape has more elements than 64 bits can count")
    empty = not math.prod(stored.shape)
    chunks = sorted({(b, s) for b, s in stored.chunks if math.prod(s) or empty})
    need(len(chunks) > 0, f"{where}: has no chunks")
    _check_cover(where, stored, chunks[:1] if empty else chunks)
    for begins, sizes in chunks[:1] if empty else chunks:
        place = metadata.places.get((name, begins))
        need(place is not None, f"{where}: nothing says where its chunk at {list(begins)} lies")
        assert place is not None
        need(
            not place.transforms,
            f"{where}: stored with {quoted(str(place.transforms[:1]), 60)}: save it without",
        )
        plain = _is_plain_name(place.file)
        need(
            plain,
            f"{where}: its chunk lies in {quoted(place.file, 60)}, no name of a {_SUFFIX} file beside it",
        )
        yield _Item(name, stored.dtype, begins, sizes, place)


def _is_plain_name(file: str) -> bool:
    return file.endswith(_SUFFIX) and len(file) <= 255 and not any(c in file for c in "/\\\0")


def _check_cover(where: str, stored: Stored, chunks: Sequence[tuple[Sizes, Sizes]]) -> None:
    """Refuse chunks that exceed the tensor, overlap, or leave elements out."""
    for begins, sizes in chunks:
        inside = all(b + s <= n for b, s, n in zip(begins, sizes, stored.shape, strict=True))
        what = f"its chunk at {list(begins)} of {list(sizes)} lies outside of it, {list(stored.shape)}"
        need(inside, f"{where}: {what}")
    n, whole = sum(math.prod(sizes) for _, sizes in chunks), math.prod(stored.shape)
    need(n >= whole, f"{where}: its chunks hold {n} of its {whole} elements")
    if pair := _overlapping(where, chunks, len(stored.shape)):
        raise Refused(f"{where}: its chunks at {list(pair[0])} and {list(pair[1])} overlap")


def _overlapping(where: str, chunks: Sequence[tuple[Sizes, Sizes]], rank: int) -> tuple[Sizes, Sizes] | None:
    """Return the first indexes of two boxes that overlap; None if no boxes overlap."""
    if len(chunks) < 2 or not rank:
        return None
    # Sorting along the axis with the most distinct first indexes leaves few boxes to compare.
    axis = max(range(rank), key=lambda i: len({begins[i] for begins, _ in chunks}))
    ordered = sorted(chunks, key=lambda chunk: chunk[0][axis])
    compared = 0
    for i, (begins, sizes) in enumerate(ordered):
        for other, lengths in ordered[i + 1 :]:
            if other[axis] >= begins[axis] + sizes[axis]:
                break
            compared += 1
            need(compared <= _MOST_COMPARED, f"{where}: its {len(chunks)} chunks are no grid")
            pairs = zip(begins, sizes, other, lengths, strict=True)
            if all(b < o + n and o < b + s for b, s, o, n in pairs):
                return begins, other
    return None


def _read_file(
    metadata: str, path: str, items: Sequence[_Item], refs: dict[tuple[str, Sizes], TensorRef | StridedRef]
) -> FileStamp:
    """Read the headers of the chunks in one file into `refs`; return the file's stamp."""
    if not volumes.lexists(path):
        raise bad(metadata, f"the file {quoted(os.path.basename(path))} is missing: {AGAIN}")
    file = _File(path)
    ordered = sorted(items, key=lambda item: (item.place.offset, item.place.nbytes))
    with reading(path) as (fd, status):
        end = 0
        for item in ordered:
            where, place = f"tensor {quoted(item.name)}", item.place
            try:
                inside = place.offset + place.nbytes <= status.st_size
                what = f"bytes {place.offset} to {place.offset + place.nbytes}, of {status.st_size}"
                need(inside, f"its chunk at {list(item.begins)} is to be at {what}: {AGAIN}")
                source = Source(fd, place.nbytes, path, place.offset)
                if source.read(0, min(4, place.nbytes), "its start").startswith(b"PK"):
                    need(place.offset >= end, f"its chunk at {list(item.begins)} overlaps the one before it")
                    end = place.offset + place.nbytes
                    ref = _saved(source, item, file)
                else:
                    ref = _in_safetensors(item, file)
                same = ref.dtype == item.dtype and ref.shape == item.sizes
                what = f"{ref.dtype} {list(ref.shape)}, not {item.dtype} {list(item.sizes)}"
                need(same, f"its chunk at {list(item.begins)} is {what}")
            except Refused as refusal:
                raise bad(path, f"{where}: {refusal}") from None
            refs[item.name, item.begins] = ref
        return FileStamp.of(path, status, file.digest.digest())


def _saved(source: Source, item: _Item, file: _File) -> TensorRef | StridedRef:
    """Return the tensor that ``torch.save`` wrote to the chunk's part of a file."""
    value, header = run_program(source)
    file.digest.update(header)
    need(isinstance(value, Tensor), "what lies there is no tensor")
    return ref_of(item.name, value, source)


def _in_safetensors(item: _Item, file: _File) -> TensorRef:
    """Return the chunk's tensor in a safetensors file; the file begins at the stated offset of all of its chunks."""
    begin = item.place.offset
    if begin not in file.blobs:
        found, about, stamp = read_header(file.path, begin)
        file.digest.update(stamp.header_digest.encode())
        told = parse_object(about.get(_SHARDING, "{}").encode(), file.path, _SHARDING, "finite")
        file.blobs[begin] = found, {n: t.get("saved_offsets") for n, t in told.items() if isinstance(t, dict)}
    tensors, begins = file.blobs[begin]
    need(item.name in tensors, "is not in it")
    same = begins.get(item.name, list(item.begins)) == list(item.begins)
    need(
        same, f"holds its chunk at {begins.get(item.name)}, not the one at {list(item.begins)}: save it again"
    )
    return tensors[item.name]


def _put_together(
    name: str,
    stored: Stored,
    items: Sequence[_Item],
    refs: Mapping[tuple[str, Sizes], TensorRef | StridedRef],
) -> SourceRef:
    """Return a tensor: its only chunk, or a `ShardedRef` of its chunks."""
    if len(items) == 1 and items[0].sizes == stored.shape:
        return refs[name, items[0].begins]
    chunks = tuple(Chunk.of(item.begins, item.sizes, refs[name, item.begins], stored.shape) for item in items)
    return ShardedRef(name, stored.dtype, stored.shape, chunks)
