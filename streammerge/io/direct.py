"""I/O past the page cache: it has the disk's speed at a fraction of the CPU time, and evicts nothing.

On a two-core machine a copy through the page cache costs as much as the arithmetic of a merge. Direct I/O moves whole
pages, and data keep their offset within the page (`streammerge.planning.memory.buffers`).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import numpy as np

from streammerge.io.buffer_pool import Bytes
from streammerge.io.pages import PAGE

_AT_ONCE = 1 << 30
"""Linux transfers at most 2 GiB per call."""
REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)
"""Error codes of file systems without direct I/O, or with a coarser alignment."""


def open_direct(descriptor: int, flags: int) -> int | None:
    """Open the file of a descriptor again for direct I/O; None if that is not supported."""
    try:
        # By descriptor, not by name, so that it is certainly the same file.
        return os.open(f"/proc/self/fd/{descriptor}", flags | os.O_DIRECT | os.O_CLOEXEC)
    except (OSError, AttributeError):
        return None


def place_in_page(data: Bytes) -> int:
    """Return a buffer's offset within its page."""
    return int(data.ctypes.data) % PAGE


def read_direct(descriptor: int, offset: int, nbytes: int, slot: Bytes) -> int:
    """Read bytes ``offset .. offset + nbytes``, and the rest of their pages, into `slot`.

    `slot` begins at a page and has room for all touched pages. Returns the number of bytes read: fewer than `nbytes` if the
    file ends early, or if it ends within a page and the system stops there.

    Raises
    ------
    OSError
        With one of `REFUSED` if the file system cannot.
    """
    lead = offset % PAGE
    wanted = -(-(lead + nbytes) // PAGE) * PAGE
    view = slot.data
    position = 0
    while position < lead + nbytes:
        end = min(wanted, position + _AT_ONCE)
        n = os.preadv(descriptor, [view[position:end]], offset - lead + position)
        position += n
        if n == 0 or n % PAGE:
            break
    return max(0, min(nbytes, position - lead))


def write_direct(descriptor: int, offset: int, data: Bytes) -> int:
    """Write whole pages of `data`, which begins at a page of memory and of the file; return the bytes written.

    Raises
    ------
    OSError
        With one of `REFUSED` if the file system cannot; else if the device fails.
    """
    view = data.data
    whole = len(view) // PAGE * PAGE
    position = 0
    while position < whole:
        end = min(whole, position + _AT_ONCE)
        n = os.pwrite(descriptor, view[position:end], offset + position)
        position += n
        if n == 0 or n % PAGE:
            break
    return position


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_MAP_FAILED = ctypes.c_void_p(-1).value


def cached_share(descriptor: int, offset: int, nbytes: int) -> float:
    """Return the fraction of a range of a file that is in the page cache; 1 if it is unknown."""
    first = offset - offset % PAGE
    length = offset + nbytes - first
    address = _LIBC.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, first)
    if address in (None, _MAP_FAILED):
        return 1.0
    try:
        pages = np.zeros(-(-length // PAGE), np.uint8)
        if _LIBC.mincore(address, length, pages.ctypes.data):
            return 1.0
        return float((pages & 1).mean())
    finally:
        _LIBC.munmap(address, length)
