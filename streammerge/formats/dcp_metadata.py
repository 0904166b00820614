"""The ``.metadata`` of a checkpoint of ``torch.distributed.checkpoint`` (DCP), read without running anything in it.

It is a pickle of a `Metadata` object: of each tensor its dtype, its size and the chunks that it is cut into, and of
each chunk the file and the bytes there that hold it. The same machine runs it that runs other PyTorch files.

Source: torch/distributed/checkpoint/metadata.py and filesystem.py of torch 2.0 to 2.13.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.formats.refusing import AGAIN, Refused, Source, need
from streammerge.formats.safetensors import MAX_NAME, MAX_RANK
from streammerge.formats.torch_names import YOUNG_DTYPES, Foreign, Known, Names
from streammerge.formats.torch_pickle import Machine, fill
from streammerge.io.files import quoted

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
"""Classes of torch.distributed whose objects say where a tensor lies, and what is kept of these; others are passed over."""

Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one chunk lies."""

    file: str
    """A plain file name beside the ``.metadata``."""
    offset: int
    nbytes: int
    """Of what was written for it, its own header included."""
    transforms: tuple[Any, ...] = ()
    """What was done to the bytes; nothing, or they cannot be read."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor."""

    dtype: str
    shape: Sizes
    chunks: tuple[tuple[Sizes, Sizes], ...]
    """Of each: where it begins on every axis, and its size there."""


@dataclass(frozen=True)
class Metadata:
    """What a ``.metadata`` says."""

    tensors: Mapping[str, Stored]
    places: Mapping[tuple[str, Sizes], Place]
    """By tensor and beginning of the chunk."""
    others: tuple[str, ...] = ()
    """Names of entries that are no tensors."""
    reformulated: frozenset[str] = frozenset()
    """Tensors that Megatron stores in another shape than their own."""


@dataclass(frozen=True, slots=True)
class _Class:
    name: str


@dataclass(eq=False, slots=True)
class _Record:
    """An object of one of the classes."""

    kind: str
    values: tuple[Any, ...] = ()
    """Of its fields."""

    def get(self, name: str) -> Any:
        """Return the value of a field; None where it has none."""
        return dict(zip(_FIELDS[self.kind], self.values, strict=False)).get(name)


class _Table(Names):
    """A dict whose keys may be records, which are kept in pairs with their values."""

    pairs: Sequence[tuple[_Record, Any]] = ()


class _NoStorages:
    def find(self, key: str, dtype: str | None, count: int, view: Any) -> Any:
        raise Refused("its .metadata holds a tensor itself: not one of torch.distributed.checkpoint")


class _MetadataMachine(Machine):
    """Makes records of the classes above, and tuples of ``torch.Size``."""

    most_steps = 120 * MAX_CHUNKS

    def find(self, module: Any, name: Any) -> None:
        """Push the mark of a class or a dtype that matters; else what the machine does."""
        if type(module) is str and type(name) is str:
            if module.startswith("torch.distributed.") and name in _FIELDS:
                return self.push(_Class(name))
            if module == "torch" and name == "Size":
                return self.push(_Class(name))
            if module == "torch" and name in _DTYPES:
                return self.push(Known("dtype", _DTYPES[name]))
        return super().find(module, name)

    def reduce(self) -> None:
        """Push the record that a class makes."""
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
        """Give a record its state: a dict of its attributes or, of `TensorProperties`, a tuple that begins with the dtype."""
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
        """Return a dict that takes records for keys."""
        return _Table()

    def set_items(self, items: tuple[Any, ...]) -> None:
        """Put keys and values into the dict on top."""
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
    """Return what a ``.metadata`` says, and its bytes. Only its own consistency is checked, not the files.

    Raises
    ------
    Refused
        If it is too large, broken, or not what DCP writes.
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
    """Yield where chunks lie; entries that are no tensors have no beginning and are passed over."""
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
