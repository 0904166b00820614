"""The registry of readers, one per kind of tensor reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streammerge.io.buffer_pool import Bytes
    from streammerge.io.reader import Reader
    from streammerge.io.scratch import Scratch

Read = Callable[["Reader", Any, int, int, "Bytes", "Scratch"], None]
"""Function that reads elements (first, end) to the beginning of the bytes; scratch has the ref's `scratch_bytes`."""
READERS: dict[type[Any], Read] = {}
"""The readers, by class of reference."""


ReadSlot = Callable[["Reader", Any, int, int, "Bytes", "Scratch", bool], int]
"""Function that reads elements (first, end) anywhere into a slot and returns the offset; see `Ref.read_slot`."""
SLOT_READERS: dict[type[Any], ReadSlot] = {}


def reads_slot(kind: type[Any]) -> Callable[[ReadSlot], ReadSlot]:
    """Register a reader that reads large parts of a kind of tensor past the page cache, if their sources allow it."""

    def register(read: ReadSlot) -> ReadSlot:
        SLOT_READERS[kind] = read
        return read

    return register


def reads(kind: type[Any]) -> Callable[[Read], Read]:
    """Register the reader of a kind of tensor."""

    def register(read: Read) -> Read:
        READERS[kind] = read
        return read

    return register
