"""Room for a file, set aside before anything is written: a full disk is found in the first second."""

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
    """Set aside `nbytes` from the beginning of a file, by the system's own call.

    `os.posix_fallocate` would write a byte into every page where a file system does not know how: for hours on NFS.

    Raises
    ------
    OSError
        If the file system has no room, or does not know how.
    """
    while _LIBC.fallocate(descriptor, 0, 0, nbytes):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def allocate(descriptor: int, nbytes: int) -> bool:
    """Give a file its size; return whether the room was set aside, which not every file system can do.

    Raises
    ------
    OSError
        If there is no room.
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
    """Refuse an output that its disk has no room for, before any of it is taken from others.

    Parameters
    ----------
    sizes, paths
        As for `space_for`.

    Raises
    ------
    WorldError
        With both numbers.
    """
    try:
        space = space_for(out, sizes, paths)
    except OSError:
        return  # what is wrong shows when it is written to
    if not space.fits:
        raise WorldError(
            f"{printable(out)}: needs {format_size(space.needed)}, {format_size(space.free)} are free: No space left "
            "on device; free some space and run the same command again, or choose another OUT"
        )
