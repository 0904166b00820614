"""Pages: what direct I/O is aligned to, and the room that an operand takes in a buffer."""

from __future__ import annotations

PAGE = 4096
"""Bytes; direct I/O moves whole pages between a file and memory at the same place of a page."""
DIRECT_BYTES = 1 << 20
"""Least bytes worth a direct transfer: smaller ones gain from the kernel's read-ahead and write-back."""
LINE = 64
"""Bytes of a cache line; tensors too small for direct I/O begin at one."""


def slot_bytes(nbytes: int, paged: bool = True) -> int:
    """Return the bytes of the slot of an operand: whole pages and one more, or whole cache lines."""
    return -(-nbytes // PAGE) * PAGE + PAGE if paged else -(-nbytes // LINE) * LINE
