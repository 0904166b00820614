"""Read the header of a safetensors file; it is checked completely before it is used.

The file begins with 8 bytes of length and that many bytes of JSON. The data of the tensors follows without gaps::

    | n: u64 | {"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...} | data |

Some ambiguous files that the reference library accepts are refused: a duplicate tensor, an unknown field of an entry
(it may change the meaning of the bytes), ``"__metadata__": null``, a header that does not begin with ``{`` (a MUST of
the specification), an empty or overlong tensor name, more than 64 dimensions, a file without tensors.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from streammerge.dtypes import BITS
from streammerge.errors import ModelError
from streammerge.formats.lookalikes import lookalike
from streammerge.formats.refs import TensorRef
from streammerge.formats.registry import Contents, opens
from streammerge.io.files import Handle, bad, quoted, read_exactly, reading
from streammerge.io.stamp import FileStamp
from streammerge.io.strict_json import MAX_NBYTES, parse_object

MAX_RANK = 64
"""Most dimensions; numpy and torch have the same limit."""

MAX_NAME = 4096
"""Longest tensor name, in characters; reports must be able to show it."""

_FIELDS = frozenset({"dtype", "shape", "data_offsets"})

_TORCH = "a file of torch.save, whose name should end in .bin, .pt, .pth or .ckpt: rename it"


SUFFIX = ".safetensors"


@opens(SUFFIX)
def open_safetensors(path: str | os.PathLike[str]) -> Contents:
    """Return the content of a safetensors file, as found by `read_header`."""
    tensors, metadata, stamp = read_header(path)
    return Contents(tensors, stamp, metadata=metadata)


def read_header(
    path: str | os.PathLike[str], begin: int = 0
) -> tuple[dict[str, TensorRef], dict[str, str], FileStamp]:
    """Return a file's tensors in the order of their bytes, its metadata, and its stamp.

    Only the header is read. Every byte of the file must belong to the header or to exactly one tensor.

    Parameters
    ----------
    begin
        Offset at which the safetensors data begins, if it is the end of a larger file.

    Raises
    ------
    ModelError
        If the file is missing, not a regular file, or breaks any rule of the format.
    WorldError
        If the machine cannot read it.
    """
    path = os.fspath(path)
    with reading(path) as (fd, status):
        raw = _raw_header(fd, status.st_size - begin, path, begin)
    header = parse_object(raw, path, "the header", "natural")
    metadata = _metadata(header.pop("__metadata__", {}), path)
    tensors = _tensors(header, path, begin + 8 + len(raw), status.st_size)
    stamp = FileStamp.of(path, status, raw)
    return tensors, metadata, stamp


def _raw_header(fd: Handle, file_nbytes: int, path: str, begin: int) -> bytes:
    if file_nbytes <= 0:
        raise bad(path, "an empty file: download or copy it again")
    first = read_exactly(fd, min(8, file_nbytes), begin, path)
    nbytes = int.from_bytes(first, "little")
    if nbytes > MAX_NBYTES:
        torch = first.startswith((b"PK\x03\x04", b"\x80\x02"))
        if what := _TORCH if torch else lookalike(first):
            raise bad(path, f"this is {what}")
    if file_nbytes < 8:
        raise bad(path, f"{file_nbytes} bytes, too few for safetensors: download or copy it again")
    if nbytes > MAX_NBYTES:
        raise bad(path, f"header length {nbytes} exceeds the limit {MAX_NBYTES}: not safetensors")
    if nbytes > file_nbytes - 8:
        what = f"header length {nbytes} is beyond the end of the file ({file_nbytes} bytes)"
        raise bad(path, f"{what}: download or copy it again")
    raw = read_exactly(fd, nbytes, begin + 8, path)
    if not raw.startswith(b"{"):
        raise bad(path, "the header is not a JSON object: not safetensors")
    return raw


def _metadata(value: Any, path: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise bad(path, "__metadata__ is not a map of strings")
    for key, text in value.items():
        if not isinstance(text, str):
            raise bad(path, f"__metadata__ {quoted(key)} is not a string")
    return value


def _tensors(header: dict[str, Any], path: str, data_start: int, file_nbytes: int) -> dict[str, TensorRef]:
    if not header:
        raise bad(path, "holds no tensors")
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    refs = [_tensor(name, entry, path, data_start, shapes) for name, entry in header.items()]
    # If two tensors have the same offset, the empty one comes first.
    refs.sort(key=lambda ref: (ref.offset, ref.nbytes))
    end = data_start
    for i, ref in enumerate(refs):
        if ref.offset > end:
            raise bad(path, f"{ref.offset - end} bytes before tensor {quoted(ref.name)} are unused")
        if ref.offset < end:
            other = quoted(refs[i - 1].name)
            raise bad(path, f"tensors {other} and {quoted(ref.name)} overlap")
        end += ref.nbytes
    if end > file_nbytes:
        what = f"truncated: {file_nbytes} bytes, but its header describes {end}"
        raise bad(path, f"{what}: download or copy it again")
    if end < file_nbytes:
        raise bad(path, f"{file_nbytes - end} bytes follow the last tensor: not valid safetensors")
    return {ref.name: ref for ref in refs}


def _tensor(
    name: str, entry: Any, path: str, data_start: int, shapes: dict[tuple[int, ...], tuple[int, ...]]
) -> TensorRef:
    """Return one checked entry; equal names, dtypes and `shapes` share one object, because there may be many."""

    def refuse(what: str) -> ModelError:
        return bad(path, f"tensor {quoted(name)}: {what}")

    if not name:
        raise bad(path, "a tensor has an empty name")
    if len(name) > MAX_NAME:
        raise refuse(f"its name has {len(name)} characters, more than {MAX_NAME}")
    if not isinstance(entry, dict):
        raise refuse("its entry is not an object")
    if entry.keys() != _FIELDS:
        missing, unknown = _FIELDS - entry.keys(), entry.keys() - _FIELDS
        raise refuse(f"no {min(missing)}" if missing else f"unknown field {quoted(min(unknown))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise refuse("its dtype is not a string")
    if dtype not in BITS:
        raise refuse(f"unknown dtype {quoted(dtype, 40)}")
    if not _whole_numbers(shape):
        raise refuse("its shape is not a list of whole numbers")
    if len(shape) > MAX_RANK:
        raise refuse(f"{len(shape)} dimensions, more than {MAX_RANK}")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise refuse("its data_offsets are not two whole numbers")
    begin, end = offsets
    if begin > end:
        raise refuse(f"its data_offsets {begin} and {end} are reversed")
    if not _fits(shape, BITS[dtype], end - begin):
        raise refuse(f"its {end - begin} bytes are not those of {dtype} with shape {shape}")
    of_shape = shapes.setdefault(tuple(shape), tuple(shape))
    return TensorRef(sys.intern(name), sys.intern(dtype), of_shape, path, data_start + begin, end - begin)


def _whole_numbers(value: Any) -> bool:
    """Return whether `value` is a list of integers; the parser has already refused negative ones."""
    return isinstance(value, list) and all(type(item) is int for item in value)  # True is no size.


def _fits(shape: list[int], bits: int, nbytes: int) -> bool:
    """Return whether `shape` takes exactly `nbytes`; intermediate numbers are bounded.

    A size of zero makes the tensor empty, but the product of the other sizes must still fit in 64 bits; otherwise no
    library could represent it.
    """
    empty = 0 in shape
    most = 2**63 - 1 if empty else 8 * nbytes
    total = bits
    for size in shape:
        total *= size or 1
        if total > most:
            return False
    return nbytes == 0 if empty else total == 8 * nbytes
