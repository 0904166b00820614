"""The format that ``torch.save`` wrote before torch 1.6, and still writes on request.

Five consecutive pickles, then the storages in the order of the last pickle::

    | magic number | 1001 | {"little_endian": True, ...} | the value | [key, ...] | n: i64, n elements | n, ... | ...

A tensor refers to its storage by key, and may use a *view* of it: ``(key, offset, size)`` in elements. The positions
of the storages are known only at the end.
"""

from __future__ import annotations

from typing import Any

from streammerge.dtypes import itemsize
from streammerge.formats import zip_archive as archive
from streammerge.formats.refusing import AGAIN, CONVERT, Refused, Source, need
from streammerge.formats.torch_names import Names, Root, Storage
from streammerge.formats.torch_pickle import Machine
from streammerge.io.files import quoted

_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The number 0x1950a86a20f9469cfc6c as pickle protocol 2 and above write it, with the end of the program."""
_VERSION = 1001


def is_legacy(first: bytes) -> bool:
    """Return whether a file with these first bytes has this format."""
    return first[:1] == b"\x80" and _MAGIC in first[2:40]


def read_legacy(source: Source) -> tuple[Any, bytes]:
    """Return the file's value, with the position of each storage, and the bytes that determine it.

    Raises
    ------
    Refused
        If the file breaks a rule of the format.
    """
    storages = _Behind()
    machine = Machine(b"", storages, source, archive.MAX_NBYTES)
    machine.run()  # The magic number.
    version = machine.run()
    need(
        version == _VERSION,
        f"a file of torch.save before 1.6 of version {quoted(str(version), 40)}: {CONVERT}",
    )
    about = machine.run()
    little = type(about) is Names and about.get("little_endian") is True
    need(little, f"written on a big-endian machine: {CONVERT}, on a little-endian one")
    value = machine.run()
    keys = machine.run()
    end = machine.at
    header = machine.raw[:end]
    return value, header + storages.place(keys, end, source)


class _Behind:
    """The storages that the value of a file refers to."""

    def __init__(self) -> None:
        self._roots: dict[str, tuple[Root, str | None, int]] = {}

    def find(self, key: str, dtype: str | None, count: int, view: Any) -> Storage:
        """Return a storage as the program describes it; its position is not yet known."""
        if not 0 <= count < 2**60:
            raise ValueError
        width = itemsize(dtype or "U8")
        root, known, n = self._roots.setdefault(
            key, (Root(f"storage {key}", count * width, -1), dtype, count)
        )
        need((known, n) == (dtype, count), f"storage {quoted(key)} has two sizes or dtypes")
        match view:
            case None:
                return Storage(root, dtype, 0, root.nbytes)
            case (str(), int() as first, int() as size) if first >= 0 and size >= 0:
                need(first + size <= count, f"a view ends beyond storage {quoted(key)} of {count} elements")
                return Storage(root, dtype, first * width, size * width)
            case _:
                raise ValueError

    def place(self, keys: Any, end: int, source: Source) -> bytes:
        """Set the positions of the storages, which follow the programs; return all bytes read for this."""
        listed = type(keys) is list and all(type(key) is str for key in keys)
        need(listed and len(set(keys)) == len(keys), f"its list of storages is broken: {AGAIN}")
        need(set(keys) == self._roots.keys(), f"its list of storages is not that of its tensors: {AGAIN}")
        counts = []
        for key in keys:
            root, _, count = self._roots[key]
            raw = source.read(end, 8, f"storage {quoted(key)}")
            n = int.from_bytes(raw, "little", signed=True)
            need(n == count, f"storage {quoted(key)} has {n} elements, not the {count} that its tensors say")
            root.begin = end + 8
            end = root.begin + root.nbytes
            what = f"truncated: storage {quoted(key)} ends at byte {end} of {source.nbytes}"
            if end > source.nbytes:
                raise Refused(f"{what}: {AGAIN}")
            counts.append(raw)
        return b"".join(counts)
