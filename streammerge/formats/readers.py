"""The registry of readers: how each kind of tensors is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streammerge.io.buffer_pool import Bytes
    from streammerge.io.reader import Reader
    from streammerge.io.scratch import Scratch

Read = Callable[["Reader", Any, int, int, "Bytes", "Scratch"], None]
"""Puts elements (first, end) of a tensor at the beginning of the bytes, with scratch of its `scratch_bytes`."""
READERS: dict[type[Any], Read] = {}
"""By kind of tensors."""


ReadSlot = Callable[["Reader", Any, int, int, "Bytes", "Scratch", bool], int]
"""Puts elements (first, end) of a tensor anywhere in its slot, and returns where; the flag is `again` of `Ref.read_slot`."""
SLOT_READERS: dict[type[Any], ReadSlot] = {}


def reads_slot(kind: type[Any]) -> Callable[[ReadSlot], ReadSlot]:
    """Register the reader of large parts of a kind of tensors, where what they are made of can be read past the page cache."""

    def register(read: ReadSlot) -> ReadSlot:
        SLOT_READERS[kind] = read
        return read

    return register


def reads(kind: type[Any]) -> Callable[[Read], Read]:
    """Register the reader of a kind of tensors."""

    def register(read: Read) -> Read:
        READERS[kind] = read
        return read

    return register
