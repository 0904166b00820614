"""Writes checkpoints of torch.distributed.checkpoint by its own classes: any cut of a tensor, and what no torch writes."""

from __future__ import annotations

import io
import itertools
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

Cut = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
"""Of each chunk: where it begins on every axis, and its size there."""
Change = Callable[[Metadata], object]


def write_dcp(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    cuts: Mapping[str, Cut] | None = None,
    *,
    n_files: int = 2,
    change: Change = lambda metadata: None,
    stored: Callable[[torch.Tensor], Any] = lambda chunk: chunk,
) -> Path:
    """Write tensors in chunks that go to the files in turn.

    Parameters
    ----------
    cuts
        Of the tensors that are not one chunk.
    change
        Changes the metadata before they are written.
    stored
        Returns what is saved in place of a chunk.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files = [io.BytesIO() for _ in range(n_files)]
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, tensor in tensors.items():
        cut = (cuts or {}).get(name, [((0,) * tensor.dim(), tuple(tensor.shape))])
        chunks = [ChunkStorageMetadata(torch.Size(begins), torch.Size(sizes)) for begins, sizes in cut]
        entries[name] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
        for i, (begins, sizes) in enumerate(cut):
            number = len(places) % n_files
            part = tensor[tuple(slice(b, b + s) for b, s in zip(begins, sizes, strict=True))].clone()
            offset = files[number].tell()
            torch.save(stored(part), files[number])
            info = _StorageInfo(f"__{number}_0.distcp", offset, files[number].tell() - offset)
            places[MetadataIndex(name, begins, i)] = info
    entries["step"] = BytesStorageMetadata()
    places[MetadataIndex("step")] = _StorageInfo("__0_0.distcp", 0, 1)
    metadata = Metadata(entries, {name: (name,) for name in tensors}, places, StorageMeta(directory))
    change(metadata)
    for number, file in enumerate(files):
        (directory / f"__{number}_0.distcp").write_bytes(file.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    return directory


def grid(shape: Sequence[int], *bounds: Sequence[int]) -> Cut:
    """Return the chunks between bounds on each axis.

    >>> grid((4, 3), (1,), ())
    [((0, 0), (1, 3)), ((1, 0), (3, 3))]
    """
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for size, inner in zip(shape, bounds, strict=True):
        edges = [0, *inner, size]
        spans = list(itertools.pairwise(edges))
        boxes = [((*b, first), (*s, last - first)) for b, s in boxes for first, last in spans]
    return boxes


# --- what must be refused

_T = {"w": torch.arange(12.0).reshape(4, 3), "n": torch.ones(6)}
_CUTS = {"w": grid((4, 3), (2,), ())}


def _hostile(change: Change = lambda metadata: None, **more: Any) -> Callable[[Path], object]:
    return lambda directory: write_dcp(directory, _T, _CUTS, change=change, **more)


def _info(metadata: Metadata, name: str = "w", at: int = 0) -> Any:
    return [info for index, info in metadata.storage_data.items() if index.fqn == name][at]


def _set(**fields: Any) -> Change:
    """Change where the first chunk of w is said to lie."""
    return lambda metadata: [setattr(_info(metadata), key, value) for key, value in fields.items()]


def _chunks(*pairs: tuple[tuple[int, ...], tuple[int, ...]]) -> Change:
    def change(metadata: Metadata) -> None:
        chunks = [ChunkStorageMetadata(torch.Size(b), torch.Size(s)) for b, s in pairs]
        metadata.state_dict_metadata["w"].chunks = chunks
        for begins, _ in pairs:
            metadata.storage_data.setdefault(MetadataIndex("w", begins), _info(metadata))

    return change


def _of(**fields: Any) -> Change:
    return lambda m: [setattr(m.state_dict_metadata["w"], key, value) for key, value in fields.items()]


def _then(build: Callable[[Path], object], after: Callable[[Path], object]) -> Callable[[Path], object]:
    def both(directory: Path) -> None:
        build(directory)
        after(directory)

    return both


def _shorter(directory: Path) -> None:
    file = directory / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-200])


class _Harm:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/harm",)


def _forget(metadata: Metadata) -> None:
    del metadata.storage_data[MetadataIndex("w", (2, 0))]


HOSTILE: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "a chunk in another directory",
        _hostile(_set(relative_path="../a/__0_0.distcp")),
        "no name of a .distcp file",
    ),
    (
        "a chunk at an absolute path",
        _hostile(_set(relative_path="/etc/x.distcp")),
        "no name of a .distcp file",
    ),
    ("a chunk in a file of another kind", _hostile(_set(relative_path="x.bin")), "no name of a .distcp file"),
    ("a file that is missing", _hostile(_set(relative_path="__9_0.distcp")), "'__9_0.distcp' is missing"),
    ("a chunk beyond the end", _hostile(_set(offset=1 << 40)), "is to be at bytes 1099511627776"),
    ("a chunk longer than its file", _hostile(_set(length=1 << 50)), "is to be at bytes"),
    ("a chunk shorter than it is", _hostile(_set(length=100)), "__0_0.distcp"),
    ("a negative offset", _hostile(_set(offset=-1)), "two whole numbers"),
    ("an offset that is no number", _hostile(_set(offset="0")), "two whole numbers"),
    ("a transformed chunk", _hostile(_set(transform_descriptors=["zstd"])), "stored with"),
    ("a chunk that lies nowhere", _hostile(_forget), "nothing says where its chunk at [2, 0] lies"),
    (
        "two chunks at one place",
        _hostile(
            lambda m: (
                setattr(_info(m, at=1), "relative_path", "__0_0.distcp")
                or setattr(_info(m, at=1), "offset", 0)
            )
        ),
        "overlaps",
    ),
    (
        "chunks that overlap",
        _hostile(_chunks(((0, 0), (3, 3)), ((2, 0), (2, 3)))),
        "its chunks at [0, 0] and [2, 0] overlap",
    ),
    (
        "chunks with a gap",
        _hostile(_chunks(((0, 0), (1, 3)), ((2, 0), (2, 3)))),
        "its chunks hold 9 of its 12 elements",
    ),
    (
        "a chunk outside of its tensor",
        _hostile(_chunks(((0, 0), (2, 3)), ((2, 0), (3, 3)))),
        "lies outside of it",
    ),
    (
        "a chunk of fewer axes",
        _hostile(_chunks(((0,), (2,)), ((2, 0), (2, 3)))),
        "a chunk has not 2 dimensions",
    ),
    ("no chunks", _hostile(_chunks()), "has no chunks"),
    (
        "a larger tensor than its chunks",
        _hostile(_of(size=torch.Size([1 << 40, 3]))),
        "of its 3298534883328 elements",
    ),
    (
        "an endless tensor",
        _hostile(_of(size=torch.Size([1 << 40, 1 << 40]))),
        "more elements than 64 bits can count",
    ),
    (
        "another dtype than the chunk's",
        _hostile(_of(properties=TensorProperties(torch.float16))),
        "is F32 [2, 3], not F16 [2, 3]",
    ),
    (
        "a dtype nobody knows",
        _hostile(_of(properties=TensorProperties(torch.quint8))),
        "its dtype is not one that can be read",
    ),
    ("a chunk of another shape", _hostile(stored=lambda t: t[:1].clone()), "is F32 [1, 3], not F32 [2, 3]"),
    ("a chunk that is no tensor", _hostile(stored=lambda t: {"w": t}), "no tensor"),
    ("a chunk that calls something", _hostile(stored=lambda t: _Harm()), "which no checkpoint needs"),
    (
        "metadata that call something",
        _hostile(lambda m: setattr(m, "storage_meta", _Harm())),
        "which no checkpoint needs",
    ),
    (
        "metadata that are a dict",
        _then(_hostile(), lambda d: (d / ".metadata").write_bytes(pickle.dumps({"w": 1}))),
        "is no Metadata",
    ),
    (
        "metadata that are text",
        _then(_hostile(), lambda d: (d / ".metadata").write_bytes(b"{}")),
        "is no pickle",
    ),
    (
        "metadata cut short",
        _then(_hostile(), lambda d: (d / ".metadata").write_bytes((d / ".metadata").read_bytes()[:300])),
        "broken",
    ),
    ("empty metadata", _then(_hostile(), lambda d: (d / ".metadata").write_bytes(b"")), "has 0 bytes"),
    ("metadata without a map", _hostile(lambda m: setattr(m, "storage_data", None)), "has no map of tensors"),
    ("a file cut short", _then(_hostile(), _shorter), "__1_0.distcp"),
    (
        "a pipe in place of a file",
        _then(_hostile(), lambda d: ((d / "__1_0.distcp").unlink(), os.mkfifo(d / "__1_0.distcp"))),
        "a pipe",
    ),
    (
        "the state of an optimizer alone",
        lambda d: write_dcp(d, {"optimizer.state.w.exp_avg": _T["w"]}),
        "holds no weights",
    ),
    (
        "Megatron's old format",
        _then(_hostile(), lambda d: (d / "metadata.json").write_text('{"sharded_backend": "zarr"}')),
        "only torch_dist is read",
    ),
    (
        "Megatron's other shapes",
        _hostile(lambda m: setattr(m, "mcore_data", {"w": {"nd_reformulated_orig_global_shape": (12,)}})),
        "Megatron stores it in another shape",
    ),
]
"""What it is, what writes it, and words of the refusal."""
