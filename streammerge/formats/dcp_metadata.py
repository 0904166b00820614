"""Read the ``.metadata`` of a ``torch.distributed.checkpoint`` (DCP) checkpoint without running code in it.

The file is a pickle of a `Metadata` object. It lists the dtype, size and chunks of each tensor, and the file and byte
range of each chunk. The stack machine for other PyTorch files interprets this pickle too.

Source: torch/distributed/checkpoint/metadata.py and filesystem.py of torch 2.0 to 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from streammerge.formats.refusing import AGAIN, Refused, Source, need
from streammerge.formats.safetensors import MAX_NAME, MAX_RANK
from streammerge.formats.torch_names import YOUNG_DTYPES, Foreign, Known, Names
from streammerge.formats.torch_pickle import Machine, fill
from streammerge.io.files import quoted
from streammerge.records import dataclass

MAX_NBYTES = 256 << 20
"""Most bytes of a ``.metadata``; a chunk takes about 200."""
MAX_CHUNKS = 200_000
"""Most chunks of all tensors together."""

_DTYPES = {
    **YOUNG_DTYPES,
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
_FIELDS = {
    "Metadata": ("state_dict_metadata", "storage_data", "mcore_data"),
    "TensorStorageMetadata": ("properties", "size", "chunks"),
    "TensorProperties": ("dtype",),
    "ChunkStorageMetadata": ("offsets", "sizes"),
    "BytesStorageMetadata": (),
    "MetadataIndex": ("fqn", "offset"),
    "_StorageInfo": ("relative_path", "offset", "length", "transform_descriptors"),
}
"""Classes of torch.distributed that describe the position of a tensor, with the fields kept; others are ignored."""

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """The position of one chunk."""

    file: str
    """The name of a file next to the ``.metadata``."""
    offset: int
    nbytes: int
    """Bytes written for the chunk, including its header."""
    transforms: tuple[Any, ...] = ()
    """Transforms applied to the bytes; if there are any, the chunk cannot be read."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor."""

    dtype: str
    shape: Sizes
    chunks: tuple[tuple[Sizes, Sizes], ...]
    """The first index and the size of each chunk, on every axis."""


@dataclass(frozen=True)
class Metadata:
    """The content of a ``.metadata``."""

    tensors: Mapping[str, Stored]
    places: Mapping[tuple[str, Sizes], Place]
    """Positions of the chunks, by tensor and first index of the chunk."""
    others: tuple[str, ...] = ()
    """Names of entries that are not tensors."""
    reformulated: frozenset[str] = frozenset()
    """Tensors that Megatron stores in a shape different from their own."""


@dataclass(frozen=True, slots=True)
class _Class:
    name: str


@dataclass(eq=False, slots=True)
class _Record:
    """An object of one of the classes in `_FIELDS`."""

    kind: str
    values: tuple[Any, ...] = ()
    """Values of the fields."""

    def get(self, name: str) -> Any:
        """Return the value of a field; None if it is missing."""
        return dict(zip(_FIELDS[self.kind], self.values, strict=False)).get(name)


class _Table(Names):
    """A dict whose keys may be records; these are kept as pairs of key and value."""

    pairs: Sequence[tuple[_Record, Any]] = ()


class _NoStorages:
    def find(self, key: str, dtype: str | None, count: int, view: Any) -> Any:
        raise Refused("its .metadata holds a tensor itself: not one of torch.distributed.checkpoint")


class _MetadataMachine(Machine):
    """A pickle machine that creates records for the classes in `_FIELDS`, and tuples for ``torch.Size``."""

    most_steps = 120 * MAX_CHUNKS

    def find(self, module: Any, name: Any) -> None:
        """Push the mark of a relevant class or dtype; otherwise do as `Machine`."""
        if type(module) is str and type(name) is str:
            if module.startswith("torch.distributed.") and name in _FIELDS:
                return self.push(_Class(name))
            if module == "torch" and name == "Size":
                return self.push(_Class(name))
            if module == "torch" and name in _DTYPES:
                return self.push(Known("dtype", _DTYPES[name]))
        return super().find(module, name)

    def reduce(self) -> None:
        """Push the record of a class."""
        function, args = self.stack[-2], self.stack[-1]
        if not isinstance(function, _Class):
            return super().reduce()
        self.pop(2)
        if function.name == "Size":
            if type(args) is not tuple or len(args) != 1 or type(args[0]) not in (tuple, list):
                raise ValueError
            return self.push(tuple(args[0]))
        return self.push(_Record(function.name))

    def build(self) -> None:
        """Set a record's state: a dict of attributes, or for `TensorProperties` a tuple that begins with the dtype."""
        record = self.stack[-2]
        if not isinstance(record, _Record):
            return super().build()
        state, fields = self.stack.pop(), _FIELDS[record.kind]
        if isinstance(state, Names):
            record.values = tuple([state.get(name) for name in fields])
            state.clear()  # Nothing else refers to it, and there may be a million.
        elif type(state) is tuple:
            record.values = state[: len(fields)]
        else:
            raise ValueError
        return None

    def new_dict(self) -> Names:
        """Return a dict that accepts records as keys."""
        return _Table()

    def set_items(self, items: tuple[Any, ...]) -> None:
        """Put keys and values into the dict on top of the stack."""
        target = self.stack[-1]
        if type(target) is not _Table:
            return super().set_items(items)
        if len(items) % 2:
            raise ValueError
        pairs = list(zip(items[::2], items[1::2], strict=True))
        records = [(key, value) for key, value in pairs if isinstance(key, _Record)]
        if records:
            target.pairs = target.pairs if isinstance(target.pairs, list) else []
            target.pairs.extend(records)
        fill(target, [(key, value) for key, value in pairs if not isinstance(key, _Record)])
        return None


def parse_metadata(source: Source) -> tuple[Metadata, bytes]:
    """Return the content of a ``.metadata``, and its bytes. Only its consistency is checked, not the other files.

    Raises
    ------
    Refused
        If it is too large, broken, or not written by DCP.
    """
    need(0 < source.nbytes <= MAX_NBYTES, f"has {source.nbytes} bytes, not 1 to {MAX_NBYTES}: {AGAIN}")
    raw = source.read(0, source.nbytes, "its program")
    need(raw.startswith(b"\x80"), "is no pickle of torch.distributed.checkpoint")
    value = _MetadataMachine(raw, _NoStorages()).run()
    sound = isinstance(value, _Record) and value.kind == "Metadata"
    need(sound, "is no Metadata of torch.distributed.checkpoint")
    entries, storage = value.get("state_dict_metadata"), value.get("storage_data")
    sound = isinstance(entries, Names) and not entries.odd and isinstance(storage, _Table)
    need(sound, "has no map of tensors and of where they lie, as torch.distributed.checkpoint writes it")
    tensors, others, n = {}, [], 0
    for name, entry in entries.items():
        need(0 < len(name) <= MAX_NAME, f"the name {quoted(name)} has not 1 to {MAX_NAME} characters")
        if isinstance(entry, _Record) and entry.kind == "TensorStorageMetadata":
            tensors[name] = _stored(name, entry)
            n += len(tensors[name].chunks)
            need(n <= MAX_CHUNKS, f"has more than {MAX_CHUNKS} chunks of tensors")
        else:
            others.append(name)
    about = value.get("mcore_data")
    odd = [name for name, told in about.items() if told] if isinstance(about, Names) else []
    return Metadata(tensors, dict(_places(storage.pairs)), tuple(others), frozenset(odd)), raw


def _stored(name: str, entry: _Record) -> Stored:
    where, properties, chunks = f"tensor {quoted(name)}", entry.get("properties"), entry.get("chunks")
    dtype = properties.get("dtype") if isinstance(properties, _Record) else None
    named = dtype.name if isinstance(dtype, Foreign) else "none"
    code = dtype.dtype if isinstance(dtype, Known) and dtype.kind == "dtype" else None
    need(code is not None, f"{where}: its dtype is not one that can be read ({named})")
    shape = _sizes(entry.get("size"), f"{where}: its size")
    need(isinstance(chunks, list), f"{where}: has no list of chunks")
    pairs = []
    for chunk in chunks:
        need(isinstance(chunk, _Record), f"{where}: a chunk is none")
        begins, sizes = (_sizes(chunk.get(key), f"{where}: {key} of a chunk") for key in ("offsets", "sizes"))
        need(len(begins) == len(sizes) == len(shape), f"{where}: a chunk has not {len(shape)} dimensions")
        pairs.append((begins, sizes))
    return Stored(str(code), shape, tuple(pairs))


def _sizes(value: Any, what: str) -> Sizes:
    sound = type(value) is tuple and all(type(n) is int and 0 <= n < 2**63 for n in value)
    need(sound, f"{what} are not whole numbers from 0 on")
    need(len(value) <= MAX_RANK, f"{what} have {len(value)} dimensions, more than {MAX_RANK}")
    return tuple(value)


def _places(pairs: Iterable[tuple[_Record, Any]]) -> Iterable[tuple[tuple[str, Sizes], Place]]:
    """Yield the positions of chunks; skip entries that are not tensors, which have no first index."""
    known: set[tuple[str, Sizes]] = set()
    for key, info in pairs:
        name, begins = key.get("fqn"), key.get("offset")
        if key.kind != "MetadataIndex" or begins is None:
            continue
        need(type(name) is str and isinstance(info, _Record), "an entry of its storage_data has no name")
        where = f"tensor {quoted(name)}"
        at = name, _sizes(begins, f"{where}: the beginning of a chunk")
        need(at not in known, f"{where}: the chunk at {list(at[1])} lies in two places")
        known.add(at)
        file, numbers = info.get("relative_path"), (info.get("offset"), info.get("length"))
        sound = type(file) is str and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
        need(sound, f"{where}: where its chunk at {list(at[1])} lies is no name and two whole numbers")
        done = info.get("transform_descriptors")
        yield at, Place(file, *numbers, tuple(done) if isinstance(done, list | tuple) else ())
