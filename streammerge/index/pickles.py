"""Checkpoints of ``torch.save``, read without torch and without running anything they say.

Such a file is a zip archive whose entries are stored as they are; ``a`` may be any name::

    | a/data.pkl | a/byteorder | a/data/0 | a/data/1 | ... | directory | end |

``data.pkl`` is a program for a stack machine which builds a dict of tensors, each a view into one
``a/data/N``. A machine of our own runs the few opcodes this takes; names of the outside world stay
marks in a table, so there is nothing to call. Python's own unpickler, however restricted, will not
do: it hashes what a file calls a key (a tuple nested deep enough overflows the C stack, which kills
the process), and sizes its memo by the largest index (8 bytes of a file take 4 GiB).

Nothing here recurses into, compares or prints what a file has nested, and nothing is extracted.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from streammerge.dtypes import itemsize
from streammerge.index.files import bad, quoted, read_exactly, reading
from streammerge.index.header import MAX_NAME, MAX_RANK, FileStamp, TensorRef

MAX_NBYTES = 64 << 20
"""Most bytes of ``data.pkl``, and of the directory; 100 000 tensors take a quarter of it."""

MAX_ENTRIES = 200_000
"""Most entries of the archive: one for each storage, and a few more."""

MAX_STEPS = 4_000_000
"""Most opcodes, of which a tensor takes about 26; each costs up to 100 bytes of memory."""

_AGAIN = "download or copy it again"
_CONVERT = "convert it to safetensors, or save it again with a current torch"
_PLAIN = "save only the dict of tensors, or convert it to safetensors"

_LOOKALIKES = {
    b"vers": "this is a git-lfs pointer, not the file itself: run `git lfs pull`",
    b"<!DO": "this is a web page, not a model: download it again",
}

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")

_FULL = 0xFFFFFFFF
"""What stands where 32 bits are too few; the number itself is in a zip64 field."""

_ENCRYPTED = 0x2041
_FOLDER = 0x10
"""What marks an entry as a directory, in DOS; torch then reads none of its bytes."""
_SIZES_FOLLOW = 0x8
"""The flag of an entry whose local header has no sizes, for they were not known yet."""


class _Refused(Exception):
    """What is wrong with the file; raised where its path is not known."""


def _need(sound: bool, otherwise: str) -> None:
    if not sound:
        raise _Refused(otherwise)


@dataclass(frozen=True, slots=True)
class _Source:
    fd: int
    nbytes: int
    path: str

    def read(self, offset: int, nbytes: int, what: str) -> bytes:
        end = f"{what} is beyond the end of the file ({self.nbytes} bytes): {_AGAIN}"
        _need(0 <= offset <= self.nbytes - nbytes, end)
        return read_exactly(self.fd, nbytes, offset, self.path)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one entry of the archive lies, in bytes from the start of the file."""

    name: str
    start: int
    """Of the local header."""
    begin: int
    """Of the data."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Known:
    """A name of the outside world that a checkpoint needs; a mark, which nobody can call."""

    kind: Literal["dict", "tensor", "young tensor", "parameter", "storage", "dtype"]
    dtype: str | None = None
    """Of a storage (None: bytes of any dtype), or the dtype itself."""


@dataclass(frozen=True, slots=True)
class _Storage:
    entry: _Entry
    dtype: str | None


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What a program says of one tensor: `skip` elements of its storage lie before it.

    What is Any here is checked when the tensor's name is known.
    """

    entry: _Entry
    dtype: str
    skip: Any
    shape: Any
    strides: Any
    bits: list[Any]
    """Nothing, or one value that is true if its numbers are stored conjugated or negated."""


_STORAGES = {
    "BoolStorage": "BOOL", "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16",
    "IntStorage": "I32", "LongStorage": "I64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "FloatStorage": "F32", "DoubleStorage": "F64", "ComplexFloatStorage": "C64",
}  # fmt: skip
_DTYPES = {
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
"""Dtypes too young to have a storage class: torch writes them beside a storage of bytes."""

_KNOWN: dict[tuple[str, str], _Known] = {
    ("collections", "OrderedDict"): _Known("dict"),
    ("torch._utils", "_rebuild_tensor_v2"): _Known("tensor"),
    ("torch._utils", "_rebuild_tensor_v3"): _Known("young tensor"),
    ("torch._utils", "_rebuild_parameter"): _Known("parameter"),
    ("torch.storage", "UntypedStorage"): _Known("storage"),
    **{("torch", name): _Known("storage", dtype) for name, dtype in _STORAGES.items()},
    **{("torch", name): _Known("dtype", dtype) for name, dtype in _DTYPES.items()},
}


def read_pickle(path: str | os.PathLike[str]) -> tuple[dict[str, TensorRef], FileStamp]:
    """Return the tensors of a ``torch.save`` file in the order of their bytes, and its stamp.

    The file must hold a dict of tensors, or a dict with one such dict in it. Reads no tensor's data;
    the bytes at each reference are the tensor's own, little-endian and row by row. Tensors may share
    bytes. The digest of the stamp is that of ``data.pkl`` and the archive's directory.

    Raises
    ------
    ModelError
        If the file is missing, not a regular file, breaks any rule of its formats, holds something
        else than tensors, or a tensor that is not contiguous.
    WorldError
        If the machine cannot read it.
    """
    path = os.fspath(path)
    with reading(path) as (fd, status):
        try:
            source = _Source(fd, status.st_size, path)
            directory, limit, count = _directory(source)
            program, storages = _members(source, _entries(source, directory, limit, count))
            tensors = _tensors(_Machine(program, storages).run())
            refs = [_ref(name, tensor, path) for name, tensor in tensors.items()]
        except _Refused as refusal:
            raise bad(path, str(refusal)) from None
    refs.sort(key=lambda ref: (ref.offset, ref.nbytes))
    digest = hashlib.blake2b(program + directory, digest_size=16).hexdigest()
    stamp = FileStamp(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, digest)
    return {ref.name: ref for ref in refs}, stamp


def _directory(source: _Source) -> tuple[bytes, int, int]:
    """Return the archive's directory, its offset, and how many entries it has."""
    _need(source.nbytes > 0, f"an empty file: {_AGAIN}")
    first = source.read(0, min(4, source.nbytes), "its start")
    other = f"no zip archive, as torch.save writes it: {_CONVERT}"
    _need(first == b"PK\3\4", _LOOKALIKES.get(first, other))
    end = max(source.nbytes - _END.size, 0)
    tail = source.read(end, source.nbytes - end, "its end")
    sound = len(tail) == _END.size and tail.startswith(b"PK\5\6") and tail.endswith(b"\0\0")
    _need(sound, f"truncated: its archive has no directory at the end: {_AGAIN}")
    _, disk, first_disk, *short, _ = _END.unpack(tail)
    here, count, nbytes, start = short
    at = max(end - _LOCATOR.size, 0)
    if (locator := source.read(at, end - at, "its end")).startswith(b"PK\6\7"):
        end, here, count, nbytes, start = _zip64_end(source, locator, at, short)
    split = disk or first_disk or here != count or start + nbytes != end
    _need(not split, "the directory of its archive is not where its end says")
    _need(count <= MAX_ENTRIES, f"its archive has {count} entries, more than {MAX_ENTRIES}")
    _need(nbytes <= MAX_NBYTES, f"its archive's directory has {nbytes} bytes, more than {MAX_NBYTES}")
    return source.read(start, nbytes, "the directory of its archive"), start, count


def _zip64_end(source: _Source, locator: bytes, at: int, short: list[int]) -> list[int]:
    """Return where the longer end begins, then what it says; `short` must say the same.

    Readers differ in which of the two ends they believe, so a file may not make it matter.
    """
    _, disk, offset, disks = _LOCATOR.unpack(locator)
    _need(offset + _END64.size == at, "the zip64 end of its archive is not where it says")
    magic, size, _, _, *disk_numbers, here, count, nbytes, start = _END64.unpack(
        source.read(offset, _END64.size, "the zip64 end of its archive")
    )
    sound = magic == b"PK\6\6" and size == _END64.size - 12 and disks == 1 and not any([disk, *disk_numbers])
    long, full = [here, count, nbytes, start], [0xFFFF, 0xFFFF, _FULL, _FULL]
    same = all(a in (b, most) for a, b, most in zip(short, long, full, strict=True))
    _need(sound and same, "the two ends of its archive contradict each other")
    return [offset, *long]


def _entries(source: _Source, directory: bytes, limit: int, count: int) -> dict[str, _Entry]:
    """Return the entries by name: none twice, none compressed, none over another or `limit`."""
    entries: dict[str, _Entry] = {}
    at = 0
    for _ in range(count):
        entry, at = _entry(source, directory, at)
        _need(entry.name not in entries, f"its archive has the entry {quoted(entry.name)} twice")
        entries[entry.name] = entry
    _need(at == len(directory), f"the directory of its archive has more than its {count} entries")
    end, before = 0, ""
    for entry in sorted(entries.values(), key=lambda entry: entry.start):
        _need(entry.start >= end, f"the entries {quoted(before)} and {quoted(entry.name)} overlap")
        end, before = entry.begin + entry.nbytes, entry.name
    _need(end <= limit, f"the entry {quoted(before)} overlaps the directory of its archive")
    return entries


def _entry(source: _Source, directory: bytes, at: int) -> tuple[_Entry, int]:
    """Return the entry at byte `at` of the directory, checked against its local header, and its end."""
    fixed = directory[at : at + _CENTRAL.size]
    sound = len(fixed) == _CENTRAL.size and fixed.startswith(b"PK\1\2")
    _need(sound, "the directory of its archive is broken")
    fields = _CENTRAL.unpack(fixed)
    flags, method, packed, nbytes, n_name, n_extra, n_comment, disk = *fields[3:5], *fields[8:14]
    name_end = at + _CENTRAL.size + n_name
    name = directory[at + _CENTRAL.size : name_end]
    text = name.decode("utf-8", "surrogateescape")  # A file name may be any bytes; torch puts it here.
    shown = f"the entry {quoted(text)}"
    end = name_end + n_extra + n_comment
    _need(end <= len(directory) and n_name <= MAX_NAME, f"{shown} is cut, or its name too long")
    extra = directory[name_end : name_end + n_extra]
    nbytes, packed, start = _numbers([nbytes, packed, fields[-1]], extra, shown)
    plain = not (flags & _ENCRYPTED or method or packed != nbytes or disk)
    _need(plain, f"{shown} is compressed or encrypted: {_CONVERT}")
    _need(not fields[-2] & _FOLDER, f"{shown} is marked as a directory: {_AGAIN}")
    return _Entry(text, start, _data_start(source, name, start, nbytes, shown), nbytes), end


def _numbers(values: list[int], extra: bytes, shown: str) -> list[int]:
    """Return `values`, those that 32 bits could not hold taken from the zip64 field in `extra`."""
    n_wanted, at = values.count(_FULL), 0
    while n_wanted and at + 4 <= len(extra):
        tag, nbytes = struct.unpack_from("<2H", extra, at)
        at += 4 + nbytes
        if tag == 1 and 8 * n_wanted <= nbytes and at <= len(extra):
            longer = iter(struct.unpack_from(f"<{n_wanted}Q", extra, at - nbytes))
            return [next(longer) if value == _FULL else value for value in values]
    _need(not n_wanted, f"{shown} has no zip64 sizes")
    return values


def _data_start(source: _Source, name: bytes, start: int, nbytes: int, shown: str) -> int:
    """Return the offset of an entry's data, its local header checked against the directory."""
    raw = source.read(start, _LOCAL.size + len(name), shown)
    magic, _, flags, method, *_, packed, size, n_name, n_extra = _LOCAL.unpack_from(raw)
    here = magic == b"PK\3\4" and n_name == len(name) and raw.endswith(name)
    _need(here, f"{shown} is not where the directory of its archive says")
    sizes = [size, packed]
    if _FULL in sizes:
        sizes = _numbers(sizes, source.read(start + len(raw), n_extra, shown), shown)
    same = sizes == [nbytes, nbytes] or (flags & _SIZES_FOLLOW and sizes == [0, 0])
    sound = same and not flags & _ENCRYPTED and not method
    _need(sound, f"{shown} contradicts the directory of its archive")
    return start + len(raw) + n_extra


def _members(source: _Source, entries: Mapping[str, _Entry]) -> tuple[bytes, dict[str, _Entry]]:
    """Return the bytes of ``data.pkl`` and the storages by key; refuse another byte order."""
    roots = [name.split("/")[0] for name in entries if name.split("/")[1:] == ["data.pkl"]]
    _need(len(roots) == 1, f"its archive has {len(roots)} entries */data.pkl, not one: {_CONVERT}")
    order, program = entries.get(f"{roots[0]}/byteorder"), entries[f"{roots[0]}/data.pkl"]
    little = order is None or source.read(order.begin, min(order.nbytes, 7), "byteorder") == b"little"
    _need(little, f"its byteorder is not little: {_CONVERT}, on a little-endian machine")
    _need(program.nbytes <= MAX_NBYTES, f"its data.pkl has {program.nbytes} bytes, more than {MAX_NBYTES}")
    start = f"{roots[0]}/data/"
    storages = {name.removeprefix(start): entry for name, entry in entries.items() if name.startswith(start)}
    return source.read(program.begin, program.nbytes, "its data.pkl"), storages


class _Machine:
    """Runs what ``torch.save`` writes of a dict of tensors; any other opcode is refused.

    Values are None, booleans, integers, strings, tuples, dicts, and the inert classes above. A step
    that fails by `IndexError` (nothing on the stack) or `ValueError` shows that the program is broken.
    """

    def __init__(self, raw: bytes, storages: Mapping[str, _Entry]) -> None:
        self.raw, self.storages = raw, storages
        self.at = 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        """The stacks under each mark."""
        self.memo: list[Any] = []

    def run(self) -> Any:
        """Return what the program leaves on the stack."""
        try:
            for _ in range(MAX_STEPS):
                code = self.take(1)
                if code == b".":
                    return self.stack.pop()  # Nobody reads what follows.
                if code not in _STEPS:
                    raise _Refused(f"its data.pkl has opcode 0x{code.hex()}, not one of tensors: {_PLAIN}")
                _STEPS[code](self)
        except (IndexError, ValueError):
            raise _Refused(f"its data.pkl is broken before byte {self.at}: {_AGAIN}") from None
        raise _Refused(f"its data.pkl has more than {MAX_STEPS} opcodes")

    def take(self, nbytes: int) -> bytes:
        self.at += nbytes
        if self.at > len(self.raw):
            raise ValueError
        return self.raw[self.at - nbytes : self.at]

    def number(self, nbytes: int, signed: bool = False) -> int:
        if nbytes > 8:
            raise _Refused(f"its data.pkl has an integer of {nbytes} bytes, more than 8")
        return int.from_bytes(self.take(nbytes), "little", signed=signed)

    def text(self, nbytes: int) -> str:
        if nbytes > 4 * MAX_NAME:
            raise _Refused(f"its data.pkl has a string of {nbytes} bytes, more than {4 * MAX_NAME}")
        return self.take(nbytes).decode()

    def line(self) -> str:
        return self.text(self.raw.index(b"\n", self.at, self.at + MAX_NAME) + 1 - self.at)[:-1]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> tuple[Any, ...]:
        """Return the `count` topmost values, the top last."""
        return tuple([self.stack.pop() for _ in range(count)][::-1])

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_mark(self) -> tuple[Any, ...]:
        values, self.stack = tuple(self.stack), self.below.pop()
        return values

    def put(self, index: int) -> None:
        """Remember the top; picklers number from 0 without a gap, so steps bound the memory."""
        if index > len(self.memo):
            raise IndexError
        self.memo[index : index + 1] = [self.stack[-1]]

    def top_dict(self) -> dict[Any, Any]:
        if type(self.stack[-1]) is not dict:
            raise ValueError
        return self.stack[-1]

    def set_items(self, items: tuple[Any, ...]) -> None:
        target = self.top_dict()
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:  # Nothing else is ever hashed: see the top of this file.
                raise _Refused(f"its data.pkl has a key of type {type(key).__name__}: {_PLAIN}")
            if key in target:
                raise _Refused(f"its data.pkl has the key {quoted(key)} twice")
            target[key] = value

    def find(self, module: Any, name: Any) -> None:
        """Push the mark that stands for a name of the outside world."""
        if type(module) is not str or type(name) is not str:
            raise ValueError
        if (module, name) not in _KNOWN:
            raise _Refused(f"its data.pkl wants {quoted(f'{module}.{name}')}, not part of a tensor: {_PLAIN}")
        self.push(_KNOWN[module, name])

    def find_storage(self) -> None:
        match self.pop(1):
            case (("storage", _Known("storage", dtype), str() as key, str(), int() as count),):
                _need(key in self.storages, f"its archive has no storage {quoted(key)}")
                entry, what = self.storages[key], f"{count} elements of {dtype or 'U8'}"
                fits = count * itemsize(dtype or "U8") == entry.nbytes
                _need(fits, f"{quoted(entry.name)} has {entry.nbytes} bytes, not {what}")
                self.push(_Storage(entry, dtype))
            case _:
                raise ValueError

    def reduce(self) -> None:
        """Do what torch's functions do: one argument list for each, the last of it often left out."""
        match self.pop(2):
            case _Known("dict"), ():
                self.push({})
            case _Known("parameter"), (_Tensor() as tensor, _, _):
                self.push(tensor)
            case _Known("tensor"), (_Storage(entry, str(code)), skip, shape, strides, _, _, *bits):
                self.push(_Tensor(entry, code, skip, shape, strides, bits))
            case _Known("young tensor"), (
                (_Storage(entry, None), skip, shape, strides, _, _, _Known("dtype", str(code)), *bits)
            ):
                self.push(_Tensor(entry, code, skip, shape, strides, bits))
            case _:
                raise ValueError


# By opcode: the protocol and the length of a frame, passed over; values; tuples; dicts; the memo; names.
# What is built into a dict (``b``) are its attributes, torch's `_metadata`, which are dropped.
_STEPS: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": lambda m: m.take(1), b"\x95": lambda m: m.take(8),
    b"N": lambda m: m.push(None), b"\x88": lambda m: m.push(True), b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number(1)), b"M": lambda m: m.push(m.number(2)),
    b"J": lambda m: m.push(m.number(4, True)), b"\x8a": lambda m: m.push(m.number(m.number(1), True)),
    b"X": lambda m: m.push(m.text(m.number(4))), b"\x8c": lambda m: m.push(m.text(m.number(1))),
    b")": lambda m: m.push(()), b"\x85": lambda m: m.push(m.pop(1)), b"\x86": lambda m: m.push(m.pop(2)),
    b"\x87": lambda m: m.push(m.pop(3)), b"(": _Machine.mark, b"t": lambda m: m.push(m.pop_mark()),
    b"}": lambda m: m.push({}), b"s": lambda m: m.set_items(m.pop(2)),
    b"u": lambda m: m.set_items(m.pop_mark()), b"b": lambda m: (m.pop(1), m.top_dict()),
    b"q": lambda m: m.put(m.number(1)), b"r": lambda m: m.put(m.number(4)),
    b"\x94": lambda m: m.put(len(m.memo)), b"h": lambda m: m.push(m.memo[m.number(1)]),
    b"j": lambda m: m.push(m.memo[m.number(4)]), b"c": lambda m: m.find(m.line(), m.line()),
    b"\x93": lambda m: m.find(*m.pop(2)), b"Q": _Machine.find_storage, b"R": _Machine.reduce,
}  # fmt: skip


def _tensors(value: Any) -> dict[str, _Tensor]:
    """Return the tensors of a dict of them, or of a dict with one such dict."""
    if type(value) is dict and len(value) == 1 and type(inner := next(iter(value.values()))) is dict:
        value = inner
    _need(type(value) is dict and len(value) > 0, f"holds no tensors by name: {_PLAIN}")
    for name, tensor in value.items():
        _need(0 < len(name) <= MAX_NAME, f"the name {quoted(name)} has not 1 to {MAX_NAME} characters")
        what = f"{quoted(name)} is no tensor but of type {type(tensor).__name__}: {_PLAIN}"
        _need(type(tensor) is _Tensor, what)
    return value


def _ref(name: str, tensor: _Tensor, path: str) -> TensorRef:
    where, shape, strides = f"tensor {quoted(name)}", tensor.shape, tensor.strides
    whole = _sizes(shape) and _sizes(strides) and _sizes((tensor.skip,)) and len(shape) == len(strides)
    _need(whole, f"{where}: its offset, shape or strides are not whole numbers from 0 on")
    _need(len(shape) <= MAX_RANK, f"{where}: {len(shape)} dimensions, more than {MAX_RANK}")
    width = itemsize(tensor.dtype)
    # The sizes of an empty tensor, too, must multiply to something that 64 bits can count.
    countable = math.prod(size or 1 for size in shape) * width < 2**63
    _need(countable, f"{where}: its shape has more elements than 64 bits can count")
    _need(
        len(tensor.bits) < 2 and not any(tensor.bits),
        f"{where} is conjugated or negated (see resolve_conj): {_CONVERT}",
    )
    cure = "save it contiguous, or convert it to safetensors"
    _need(_row_major(shape, strides), f"{where} is not contiguous: {cure}")
    entry, begin, nbytes = tensor.entry, tensor.skip * width, math.prod(shape) * width
    what = f"wants bytes {begin} to {begin + nbytes} of {quoted(entry.name)}, which has {entry.nbytes}"
    _need(begin + nbytes <= entry.nbytes, f"{where} {what}")
    return TensorRef(name, tensor.dtype, shape, path, entry.begin + begin, nbytes)


def _sizes(values: Any) -> bool:
    return type(values) is tuple and all(type(value) is int and value >= 0 for value in values)


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements lie one after the other; a step along one element does not matter."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return 0 in shape
        step *= size
    return True
