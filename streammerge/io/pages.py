"""Pages, the alignment of direct I/O, and the size of an operand's slot in a buffer."""

from __future__ import annotations

PAGE = 4096
"""Size of a page in bytes; direct I/O moves whole pages."""
DIRECT_BYTES = 1 << 20
"""Smallest direct transfer in bytes; smaller ones gain from the kernel's read-ahead and write-back."""
LINE = 64
"""Size of a cache line in bytes, the alignment of tensors that are too small for direct I/O."""


def slot_bytes(nbytes: int, paged: bool = True) -> int:
    """Return the size of an operand's slot: whole pages plus one, or whole cache lines."""
    return -(-nbytes // PAGE) * PAGE + PAGE if paged else -(-nbytes // LINE) * LINE
