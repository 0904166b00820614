"""Copies out of a memory map that cannot kill the process.

Touching a page of a map that the file no longer has, or that the disk fails to give, raises SIGBUS. The system
call that copies between processes touches it in the kernel, where that is but a short count; it copies within
one process as well.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import numpy as np

from streammerge.io.buffer_pool import Bytes


class _Range(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_LIBC = ctypes.CDLL(None, use_errno=True)
_COPY = getattr(_LIBC, "process_vm_readv", None)
if _COPY is not None:
    _COPY.restype = ctypes.c_ssize_t
    _COPY.argtypes = (
        ctypes.c_int,
        ctypes.POINTER(_Range),
        ctypes.c_ulong,
        ctypes.POINTER(_Range),
        ctypes.c_ulong,
        ctypes.c_ulong,
    )


def copy_mapped(mapped: mmap.mmap, offset: int, target: Bytes) -> int:
    """Fill `target` from byte `offset` of a map; return the bytes copied, fewer where pages are gone.

    None are copied where the system has no such call or does not allow it.
    """
    source = np.frombuffer(mapped, np.uint8)[offset:]
    assert source.size >= target.size
    done = 0
    while _COPY is not None and done < target.size:
        ours = _Range(target.ctypes.data + done, target.size - done)
        theirs = _Range(source.ctypes.data + done, target.size - done)
        n = _COPY(os.getpid(), ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0)
        if n <= 0:
            break
        done += n
    del source  # a map that something looks at cannot be closed
    return done
