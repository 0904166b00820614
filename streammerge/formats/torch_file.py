"""Read checkpoints of ``torch.save`` without torch and without running code in them.

There are two formats: a zip archive (`streammerge.formats.zip_archive`), and the format before torch 1.6, a sequence of
pickles followed by the storages (`streammerge.formats.torch_legacy`). `streammerge.formats.torch_pickle` interprets the
pickle program in either.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from streammerge.dtypes import itemsize
from streammerge.formats.lookalikes import lookalike
from streammerge.formats.refs import SourceRef, TensorRef
from streammerge.formats.refusing import AGAIN, CONVERT, PLAIN, Refused, Source, need
from streammerge.formats.registry import Contents, opens
from streammerge.formats.safetensors import MAX_NAME, MAX_RANK
from streammerge.formats.strided_refs import StridedRef
from streammerge.formats.torch_legacy import is_legacy, read_legacy
from streammerge.formats.torch_names import Foreign, Names, Root, Storage, Tensor
from streammerge.formats.torch_pickle import Machine
from streammerge.formats.zip_archive import Entry, find_directory, find_members, read_entries
from streammerge.io.files import bad, quoted, reading
from streammerge.io.stamp import FileStamp

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params")
"""Names under which trainers save the weights with other data; the first name found is used."""
_MOST_WRAPPERS = 4
_MOST_REPEATED = 1 << 20
"""Most bytes by which an expanded tensor may exceed the bytes in the file."""


PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def read_pickle(path: str | os.PathLike[str]) -> tuple[Mapping[str, SourceRef], FileStamp]:
    """Return the tensors and the stamp of `open_pickle`."""
    file = open_pickle(path)
    return file.refs, file.stamp


@opens(*PICKLES)
def open_pickle(path: str | os.PathLike[str]) -> Contents:
    """Return the content of a ``torch.save`` file.

    The file must hold a dict of tensors at the top level or where trainers put it (under ``state_dict``, ``model``,
    ``module``, or alone in a dict). Other data, and entries of the dict that are not tensors, are skipped. No tensor
    data is read. The bytes at each reference are the tensor's elements, little-endian. Tensors may share bytes. The
    digest of the stamp covers the program and the records of the storages' positions.

    Raises
    ------
    ModelError
        If the file is missing, is not a regular file, breaks any rule of its format, or does not hold tensors.
    WorldError
        If the machine cannot read it.
    """
    path = os.fspath(path)
    with reading(path) as (fd, status):
        try:
            source = Source(fd, status.st_size, path)
            value, header = run_program(source)
            tensors, left_out = _tensors(value)
            refs = [ref_of(name, tensor, source) for name, tensor in tensors.items()]
        except Refused as refusal:
            raise bad(path, str(refusal)) from None
    refs.sort(key=lambda ref: (ref.stored.offset, ref.nbytes))
    return Contents({ref.name: ref for ref in refs}, FileStamp.of(path, status, header), left_out)


def run_program(source: Source) -> tuple[Any, bytes]:
    """Return the result of a file's program, and the bytes that determine it."""
    need(source.nbytes > 0, f"an empty file: {AGAIN}")
    first = source.read(0, min(512, source.nbytes), "its start")
    if is_legacy(first):
        return read_legacy(source)
    if not first.startswith(b"PK\3\4"):
        what = lookalike(first)
        raise Refused(f"this is {what}" if what else f"no zip archive, as torch.save writes it: {CONVERT}")
    directory, limit, count = find_directory(source)
    program, storages = find_members(source, read_entries(source, directory, limit, count))
    return Machine(program, _Members(storages)).run(), program + directory


class _Members:
    """The storages of an archive."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._roots = {key: Root(entry.name, entry.nbytes, entry.begin) for key, entry in entries.items()}

    def find(self, key: str, dtype: str | None, count: int, view: Any) -> Storage:
        """Return the storage `key`, which must be an archive entry of this size."""
        if view is not None:
            raise ValueError
        need(key in self._roots, f"its archive has no storage {quoted(key)}")
        root, what = self._roots[key], f"{count} elements of {dtype or 'U8'}"
        fits = count * itemsize(dtype or "U8") == root.nbytes
        need(fits, f"{quoted(root.name)} has {root.nbytes} bytes, not {what}")
        return Storage(root, dtype, 0, root.nbytes)


def _tensors(value: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the dict of tensors in a file's content, and the names of the other entries."""
    left_out: list[str] = []
    for _ in range(_MOST_WRAPPERS):
        inner = _wrapped(value)
        if inner is None:
            break
        left_out += [name for name in value if value[name] is not inner]
        value = inner
    if isinstance(value, Foreign):
        raise Refused(
            f"holds no tensors by name but {value.name}: save its state_dict(), or convert it to safetensors"
        )
    named = type(value) is Names
    need(not (named and value.odd), f"its data.pkl has a key of type {getattr(value, 'odd', '')}: {PLAIN}")
    beside = _beside(value) if named else set()
    found = {k: v for k, v in value.items() if k not in beside} if named else {}
    need(len(found) > 0, f"holds no tensors by name: {PLAIN}")
    left_out += [name for name in value if name not in found]
    for name, tensor in found.items():
        need(0 < len(name) <= MAX_NAME, f"the name {quoted(name)} has not 1 to {MAX_NAME} characters")
        need(type(tensor) is Tensor, f"{quoted(name)} is no tensor but {_kind(tensor)}: {PLAIN}")
    return found, tuple(left_out)


def _wrapped(value: Any) -> Any:
    """Return the entry of a dict that contains the tensors; None if they are in the dict itself."""
    if type(value) is not Names:
        return None
    for name in _WRAPPERS:
        inner = value.get(name)
        if type(inner) is Names and inner and inner is not value:
            return inner
        if (
            name == "model"
            and isinstance(inner, Foreign)
            and not any(type(v) is Tensor for v in value.values())
        ):
            return inner  # A whole module; the refusal must name it.
    if len(value) == 1 and not value.odd and type(inner := next(iter(value.values()))) is Names:
        return inner if any(type(v) is not Names for v in inner.values()) or not inner else None
    return None


def _beside(named: Names) -> set[str]:
    """Return the names of entries that are not weights but were saved by a trainer with them.

    Among tensors, these are plain values, and objects of other classes under names that no module of a model has. An
    object in a parameter's place (a quantised tensor with its own class) is not skipped.
    """
    tensors = [name for name, value in named.items() if type(value) is Tensor]
    if not tensors:
        return {name for name in named if name.endswith("_extra_state")}
    in_modules = all("." in name for name in tensors)
    return {
        name
        for name, value in named.items()
        if type(value) is not Tensor
        and (
            not isinstance(value, Foreign)
            or name.endswith("_extra_state")  # of Transformer Engine
            or (in_modules and "." not in name)
        )
    }


def _kind(value: Any) -> str:
    if isinstance(value, Foreign):
        return value.name
    return f"of type {'dict' if type(value) is Names else type(value).__name__}"


def ref_of(name: str, tensor: Tensor, source: Source) -> TensorRef | StridedRef:
    """Return the reference to a tensor in a file, checked against its storage."""
    where, shape, strides = f"tensor {quoted(name)}", tensor.shape, tensor.strides
    whole = _sizes(shape) and _sizes(strides) and _sizes((tensor.skip,)) and len(shape) == len(strides)
    need(whole, f"{where}: its offset, shape or strides are not whole numbers from 0 on")
    need(len(shape) <= MAX_RANK, f"{where}: {len(shape)} dimensions, more than {MAX_RANK}")
    width = itemsize(tensor.dtype)
    # The product of the non-zero sizes of an empty tensor must fit in 64 bits too.
    countable = math.prod(size or 1 for size in shape) * width < 2**63
    need(countable, f"{where}: its shape has more elements than 64 bits can count")
    need(
        len(tensor.bits) < 2 and not any(tensor.bits),
        f"{where} is conjugated or negated (see resolve_conj): {CONVERT}",
    )
    storage = tensor.storage
    n = math.prod(shape)
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if n else 0
    contiguous = _row_major(shape, strides)
    # Torch keeps the offset of an empty view, even beyond the end; nothing is read there.
    begin, nbytes = tensor.skip * width if n else 0, (n if contiguous else span) * width
    what = (
        f"wants bytes {begin} to {begin + nbytes} of {quoted(storage.root.name)}, which has {storage.nbytes}"
    )
    need(begin + nbytes <= storage.nbytes, f"{where} {what}")
    offset = source.begin + storage.root.begin + storage.begin + begin
    if contiguous:
        return TensorRef(name, tensor.dtype, shape, source.path, offset, nbytes)
    repeats = n * width > source.nbytes + _MOST_REPEATED
    need(not repeats, f"{where}: a view of {n * width} bytes upon {nbytes} (stride 0): save it contiguous")
    stretch = TensorRef(name, tensor.dtype, (span,), source.path, offset, nbytes)
    return StridedRef(stretch, shape, strides)


def _sizes(values: Any) -> bool:
    return type(values) is tuple and all(type(value) is int and value >= 0 for value in values)


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether the elements are contiguous in order; the stride of an axis of size 1 does not matter."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return 0 in shape
        step *= size
    return True
