"""Locks of directories and files, held by one process at a time until it ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streammerge.errors import OutputError
from streammerge.io.durable import world_errors


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file or directory until it is closed; return False if a different process holds it.

    Several processes may hold it if all of them want it `shared`.

    Raises
    ------
    OSError
        If the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether an open directory is still the one at this path."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def locked_directory(path: Path, taken: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of an existing directory.

    Parameters
    ----------
    taken
        The message if a different process holds the lock.
    shared
        Whether others may hold it too, as long as nobody wants it alone.

    Raises
    ------
    OutputError
        If a different process holds it, or has just released it and removed the directory.
    WorldError
        If it cannot be opened or locked.
    """
    with world_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with world_errors(path):
            free = try_lock(descriptor, shared=shared)
        if not free or not _is_at(path, descriptor):
            raise OutputError(taken)
        yield
    finally:
        os.close(descriptor)
