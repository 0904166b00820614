"""Find the entries of the zip archive of a ``torch.save`` file, each checked against both of its headers.

The entries are not compressed; ``a`` may be any name::

    | a/data.pkl | a/byteorder | a/data/0 | a/data/1 | ... | directory | end |

Nothing is extracted.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from streammerge.formats.refusing import AGAIN, CONVERT, Source, need
from streammerge.formats.safetensors import MAX_NAME
from streammerge.io.files import quoted
from streammerge.records import dataclass

MAX_NBYTES = 64 << 20
"""Most bytes of ``data.pkl``, and of the directory; 100 000 tensors take a quarter of this."""

MAX_ENTRIES = 200_000
"""Most entries of the archive: one per storage, and a few more."""

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")

_FULL = 0xFFFFFFFF
"""The placeholder for a number that exceeds 32 bits; the number is in a zip64 field."""

_STATE_DICT = "save `torch.jit.load(file).state_dict()` by torch.save, or as safetensors"
_ENCRYPTED = 0x2041
_FOLDER = 0x10
"""The DOS attribute of a directory; torch reads no bytes of such an entry."""
_SIZES_FOLLOW = 0x8
"""The flag of an entry whose local header has no sizes because they were not yet known."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The position of one entry of the archive, in bytes from the start of the file."""

    name: str
    start: int
    """Offset of the local header."""
    begin: int
    """Offset of the data."""
    nbytes: int


def find_directory(source: Source) -> tuple[bytes, int, int]:
    """Return the archive's directory, its offset, and its number of entries."""
    end = max(source.nbytes - _END.size, 0)
    tail = source.read(end, source.nbytes - end, "its end")
    sound = len(tail) == _END.size and tail.startswith(b"PK\5\6") and tail.endswith(b"\0\0")
    need(sound, f"truncated: its archive has no directory at the end: {AGAIN}")
    _, disk, first_disk, *short, _ = _END.unpack(tail)
    here, count, nbytes, start = short
    at = max(end - _LOCATOR.size, 0)
    if (locator := source.read(at, end - at, "its end")).startswith(b"PK\6\7"):
        end, here, count, nbytes, start = _zip64_end(source, locator, at, short)
    split = disk or first_disk or here != count or start + nbytes != end
    need(not split, "the directory of its archive is not where its end says")
    need(count <= MAX_ENTRIES, f"its archive has {count} entries, more than {MAX_ENTRIES}")
    need(nbytes <= MAX_NBYTES, f"its archive's directory has {nbytes} bytes, more than {MAX_NBYTES}")
    return source.read(start, nbytes, "the directory of its archive"), start, count


def _zip64_end(source: Source, locator: bytes, at: int, short: list[int]) -> list[int]:
    """Return the offset of the zip64 end record, then its values; the values in `short` must agree.

    Readers differ in which of the two end records they use, so a file in which the records differ is refused.
    """
    _, disk, offset, disks = _LOCATOR.unpack(locator)
    need(offset + _END64.size == at, "the zip64 end of its archive is not where it says")
    magic, size, _, _, *disk_numbers, here, count, nbytes, start = _END64.unpack(
        source.read(offset, _END64.size, "the zip64 end of its archive")
    )
    sound = magic == b"PK\6\6" and size == _END64.size - 12 and disks == 1 and not any([disk, *disk_numbers])
    long, full = [here, count, nbytes, start], [0xFFFF, 0xFFFF, _FULL, _FULL]
    same = all(a in (b, most) for a, b, most in zip(short, long, full, strict=True))
    need(sound and same, "the two ends of its archive contradict each other")
    return [offset, *long]


def read_entries(source: Source, directory: bytes, limit: int, count: int) -> dict[str, Entry]:
    """Return the entries by name; refuse duplicate, compressed or overlapping entries, and entries beyond `limit`."""
    entries: dict[str, Entry] = {}
    at = 0
    for _ in range(count):
        entry, at = _entry(source, directory, at)
        need(entry.name not in entries, f"its archive has the entry {quoted(entry.name)} twice")
        entries[entry.name] = entry
    need(at == len(directory), f"the directory of its archive has more than its {count} entries")
    end, before = 0, ""
    for entry in sorted(entries.values(), key=lambda entry: entry.start):
        need(entry.start >= end, f"the entries {quoted(before)} and {quoted(entry.name)} overlap")
        end, before = entry.begin + entry.nbytes, entry.name
    need(end <= limit, f"the entry {quoted(before)} overlaps the directory of its archive")
    return entries


def _entry(source: Source, directory: bytes, at: int) -> tuple[Entry, int]:
    """Return the entry at byte `at` of the directory, checked against its local header, and its end."""
    fixed = directory[at : at + _CENTRAL.size]
    sound = len(fixed) == _CENTRAL.size and fixed.startswith(b"PK\1\2")
    need(sound, "the directory of its archive is broken")
    fields = _CENTRAL.unpack(fixed)
    flags, method, packed, nbytes, n_name, n_extra, n_comment, disk = *fields[3:5], *fields[8:14]
    name_end = at + _CENTRAL.size + n_name
    name = directory[at + _CENTRAL.size : name_end]
    text = name.decode("utf-8", "surrogateescape")  # Torch puts the file's name here, which may be any bytes.
    shown = f"the entry {quoted(text)}"
    end = name_end + n_extra + n_comment
    need(end <= len(directory) and n_name <= MAX_NAME, f"{shown} is cut, or its name too long")
    extra = directory[name_end : name_end + n_extra]
    nbytes, packed, start = _numbers([nbytes, packed, fields[-1]], extra, shown)
    plain = not (flags & _ENCRYPTED or method or packed != nbytes or disk)
    need(plain, f"{shown} is compressed or encrypted: {CONVERT}")
    need(not fields[-2] & _FOLDER, f"{shown} is marked as a directory: {AGAIN}")
    return Entry(text, start, _data_start(source, name, start, nbytes, shown), nbytes), end


def _numbers(values: list[int], extra: bytes, shown: str) -> list[int]:
    """Return `values`, with placeholders replaced by the numbers in the zip64 field of `extra`."""
    n_wanted, at = values.count(_FULL), 0
    while n_wanted and at + 4 <= len(extra):
        tag, nbytes = struct.unpack_from("<2H", extra, at)
        at += 4 + nbytes
        if tag == 1 and 8 * n_wanted <= nbytes and at <= len(extra):
            longer = iter(struct.unpack_from(f"<{n_wanted}Q", extra, at - nbytes))
            return [next(longer) if value == _FULL else value for value in values]
    need(not n_wanted, f"{shown} has no zip64 sizes")
    return values


def _data_start(source: Source, name: bytes, start: int, nbytes: int, shown: str) -> int:
    """Return the offset of an entry's data, after checking its local header against the directory."""
    raw = source.read(start, _LOCAL.size + len(name), shown)
    magic, _, flags, method, *_, packed, size, n_name, n_extra = _LOCAL.unpack_from(raw)
    here = magic == b"PK\3\4" and n_name == len(name) and raw.endswith(name)
    need(here, f"{shown} is not where the directory of its archive says")
    sizes = [size, packed]
    if _FULL in sizes:
        sizes = _numbers(sizes, source.read(start + len(raw), n_extra, shown), shown)
    same = sizes == [nbytes, nbytes] or (flags & _SIZES_FOLLOW and sizes == [0, 0])
    sound = same and not flags & _ENCRYPTED and not method
    need(sound, f"{shown} contradicts the directory of its archive")
    return start + len(raw) + n_extra


def find_members(source: Source, entries: Mapping[str, Entry]) -> tuple[bytes, dict[str, Entry]]:
    """Return the bytes of ``data.pkl`` and the storages by key; refuse a byte order other than little-endian."""
    tops = [name.split("/") for name in entries]
    script = any(len(parts) > 1 and parts[1] in ("code", "constants.pkl") for parts in tops)
    need(not script, f"a TorchScript archive, a program with its weights: {_STATE_DICT}")
    arrays = bool(entries) and all(name.endswith(".npy") for name in entries)
    need(not arrays, "arrays of numpy (.npz), no PyTorch checkpoint: write them as safetensors")
    roots = [parts[0] for parts in tops if parts[1:] == ["data.pkl"]]
    need(len(roots) == 1, f"its archive has {len(roots)} entries */data.pkl, not one: {CONVERT}")
    order, program = entries.get(f"{roots[0]}/byteorder"), entries[f"{roots[0]}/data.pkl"]
    little = order is None or source.read(order.begin, min(order.nbytes, 7), "byteorder") == b"little"
    need(little, f"its byteorder is not little: {CONVERT}, on a little-endian machine")
    need(program.nbytes <= MAX_NBYTES, f"its data.pkl has {program.nbytes} bytes, more than {MAX_NBYTES}")
    start = f"{roots[0]}/data/"
    storages = {name.removeprefix(start): entry for name, entry in entries.items() if name.startswith(start)}
    return source.read(program.begin, program.nbytes, "its data.pkl"), storages
