"""Copy from a memory map without the risk of SIGBUS.

Accessing a mapped page that the file no longer has, or that the disk fails to read, raises SIGBUS. The system call that
copies between processes (here: within one) accesses the page in the kernel, where the failure is only a short count.
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
    """Fill `target` from byte `offset` of a map; return the bytes copied, fewer if pages are missing.

    Nothing is copied if the system lacks the call or does not permit it.
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
    del source  # a map with exported buffers cannot be closed
    return done
