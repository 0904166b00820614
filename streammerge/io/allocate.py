"""Reserve space for files before anything is written, so that a full disk is detected at once."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Mapping
from pathlib import Path

from streammerge.errors import WorldError, printable
from streammerge.io.disk import Paths, space_for
from streammerge.units import format_size

_REFUSED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(descriptor: int, nbytes: int) -> None:
    """Reserve the first `nbytes` of a file with the system's own call.

    `os.posix_fallocate` would write a byte into every page if the file system lacks the call, for hours on NFS.

    Raises
    ------
    OSError
        If the file system is full, or lacks the call.
    """
    while _LIBC.fallocate(descriptor, 0, 0, nbytes):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def allocate(descriptor: int, nbytes: int) -> bool:
    """Give a file its size; return whether its space was reserved, which not every file system supports.

    Raises
    ------
    OSError
        If the file system is full.
    """
    try:
        fallocate(descriptor, nbytes)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        os.ftruncate(descriptor, nbytes)
        return False
    return True


def check_space(out: Path, sizes: Mapping[str, int], paths: Paths | None = None) -> None:
    """Refuse an output that does not fit on its disk, before any space is used.

    Parameters
    ----------
    sizes, paths
        As in `space_for`.

    Raises
    ------
    WorldError
        If it does not fit; the message has both numbers.
    """
    try:
        space = space_for(out, sizes, paths)
    except OSError:
        return  # writing will report the problem
    if not space.fits:
        raise WorldError(
            f"{printable(out)}: needs {format_size(space.needed)}, {format_size(space.free)} are free: No space left "
            "on device; free some space and run the same command again, or choose a different OUT"
        )
