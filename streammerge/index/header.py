"""Safetensors headers: where the bytes of each tensor lie. Nothing but the header is read.

Every rule of the format is checked before anything is believed: the length against the file before
memory is taken, offsets against each other and the file's end, shapes against offsets.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass
from typing import Any

from streammerge.dtypes import BITS
from streammerge.errors import ModelError, WorldError, printable
from streammerge.index.strict_json import BadJson, parse_object

MAX_HEADER = 100_000_000
"""The format's own bound, in bytes."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where the bytes of one tensor lie."""

    name: str
    dtype: str
    """The format's code, such as ``BF16``."""
    shape: tuple[int, ...]
    path: str
    offset: int
    """Absolute byte offset in the file."""
    nbytes: int

    @property
    def n_elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return self.nbytes * 8 // BITS[self.dtype]


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What identifies an input file: a change of any of these is a change of the input."""

    path: str
    nbytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    header_digest: str
    """BLAKE2b-128 of the raw header, hexadecimal."""


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file read-only and return its descriptor; a FIFO or device is refused unopened.

    Raises
    ------
    ModelError
        If it is missing, unreadable, or not a regular file.
    WorldError
        If the device fails.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise ModelError(f"{printable(path)}: not a regular file")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise ModelError(f"{printable(path)}: not a usable path ({printable(error)})") from None
    except OSError as error:
        if error.errno == errno.EIO:
            raise WorldError(f"{printable(path)}: {error.strerror}") from error
        raise ModelError(f"{printable(path)}: cannot be read: {error.strerror}") from None
    return descriptor


def read_header(
    path: str | os.PathLike[str],
) -> tuple[dict[str, TensorRef], dict[str, str], FileStamp]:
    """Return the tensors (in file order), the metadata and the stamp of one safetensors file.

    Raises
    ------
    ModelError
        If the file breaks any rule of the format; the message names the file and the rule.
    """
    name = os.fspath(path)
    descriptor = open_regular(name)
    try:
        status = os.fstat(descriptor)
        raw = _raw_header(descriptor, status.st_size)
        tensors, metadata = _parse(raw, name, status.st_size)
    except (BadJson, _BadHeader) as error:
        raise ModelError(
            f"{printable(name)}: not a valid safetensors file: {printable(error)}"
        ) from None
    except OSError as error:
        raise WorldError(f"{printable(name)}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    stamp = FileStamp(
        name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino,
        hashlib.blake2b(raw, digest_size=16).hexdigest(),
    )  # fmt: skip
    return tensors, metadata, stamp


class _BadHeader(ValueError):
    pass


def _raw_header(descriptor: int, size: int) -> bytes:
    start = os.pread(descriptor, 8, 0)
    if len(start) < 8:
        raise _BadHeader(f"it has {size} bytes; the header's length alone takes 8")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER:
        raise _BadHeader(f"header length {length} exceeds the format's {MAX_HEADER}")
    if 8 + length > size:
        raise _BadHeader(f"header length {length} points beyond the file's {size} bytes")
    raw = b""
    while len(raw) < length:
        part = os.pread(descriptor, length - len(raw), 8 + len(raw))
        if not part:
            raise _BadHeader("the file shrank while it was read")
        raw += part
    if not raw.startswith(b"{"):
        raise _BadHeader("the header does not begin with '{'")
    return raw


def _parse(raw: bytes, path: str, size: int) -> tuple[dict[str, TensorRef], dict[str, str]]:
    entries = parse_object(raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _BadHeader("__metadata__ is not a map of strings")
    if not entries:
        raise _BadHeader("it holds no tensors")
    data = 8 + len(raw)
    spans = sorted(
        (_entry(name, entry, size - data) for name, entry in entries.items()),
        key=lambda span: (span[0], span[1]),
    )
    position = 0
    tensors = {}
    for start, stop, name, dtype, shape in spans:
        if start != position:
            what = "overlaps the one before it" if start < position else "leaves a hole before it"
            raise _BadHeader(f"tensor {printable(name, 200)}: its bytes [{start}, {stop}) {what}")
        tensors[name] = TensorRef(name, dtype, shape, path, data + start, stop - start)
        position = stop
    if data + position != size:
        raise _BadHeader(f"the tensors end at byte {data + position}, the file at {size}")
    return tensors, metadata


def _entry(name: str, entry: Any, available: int) -> tuple[int, int, str, str, tuple[int, ...]]:
    label = f"tensor {printable(name, 200)}"
    if not name:
        raise _BadHeader("a tensor has an empty name")
    if not isinstance(entry, dict):
        raise _BadHeader(f"{label}: not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _BadHeader(f"{label}: unknown dtype {printable(dtype, 60)}")
    if not _naturals(shape):
        raise _BadHeader(f"{label}: shape is not a list of natural numbers")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _BadHeader(f"{label}: data_offsets is not a pair of natural numbers")
    start, stop = offsets
    if not start <= stop <= available:
        raise _BadHeader(f"{label}: data_offsets {start}, {stop} do not lie in the file")
    if _bits(shape, BITS[dtype], available * 8) != (stop - start) * 8:
        raise _BadHeader(f"{label}: {stop - start} bytes do not match its shape and dtype {dtype}")
    return start, stop, name, dtype, tuple(shape)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _bits(shape: list[int], bits: int, limit: int) -> int:
    """Return the bits of a tensor, or some number beyond `limit` as soon as it is exceeded."""
    if 0 in shape:
        return 0
    for size in shape:
        bits *= size
        if bits > limit:
            break
    return bits
