"""Changes to the file system that survive a loss of power, and a machine's failures in one line.

Two rules, kept by all who write here. A name means a finished file: what is written is synced under another name
first. And a sync that failed is never asked again: the system has dropped what it could not write and would
answer that all is well, so whoever comes later writes it anew.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streammerge.errors import WorldError, printable

PARTIAL = ".partial"
"""Ends the name of a file that is not finished."""

_KEPT = "what is finished is kept; run the same command again"
_FULL = "free some space and run the same command again"
_LOCKED = "make it writable and run the same command again, or choose another OUT"
_CURES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "raise the limit (`ulimit -f`, or the file system's) and run the same command again, or start over "
    "with a smaller --shard-size and --overwrite",
    errno.EROFS: _LOCKED,
    errno.EACCES: _LOCKED,
    errno.EPERM: _LOCKED,
    errno.EIO: f"check the disk; {_KEPT}",
    errno.ELOOP: "a link is not followed here; remove it and run the same command again",
    errno.ENAMETOOLONG: "choose a shorter OUT",
    errno.ENOTDIR: "choose another OUT",
}


def cure_of(error: OSError, otherwise: str) -> str:
    """Return how a failure is mended where nothing is there yet that could be kept."""
    return _CURES.get(error.errno or 0, otherwise).removesuffix(f"; {_KEPT}")


@contextmanager
def world_errors(what: object) -> Iterator[None]:
    """Turn an OSError into a WorldError that names what was being done and how to go on."""
    try:
        yield
    except OSError as error:
        cure = _CURES.get(error.errno or 0, _KEPT)
        raise WorldError(f"{printable(what)}: {error.strerror or error}; {cure}") from error


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable, where the file system can be asked for it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems: their server sees to it
            raise
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, their names durable.

    Those that exist are seen to as well: whoever made them may have been killed before.
    """
    path.mkdir(parents=True, exist_ok=True)
    place = path.resolve()
    device = place.stat().st_dev
    for above in place.parents:
        if above.stat().st_dev != device:
            return
        try:
            fsync_directory(above)
        except PermissionError:
            continue  # nothing in a directory that we may not read was made by us


def make_folders(out: Path, name: str) -> None:
    """Make the folders that a path in a directory leads through, their names durable; none may be a link.

    Raises
    ------
    WorldError
        If that is not to be had.
    """
    folder = out
    for part in name.split("/")[:-1]:
        above, folder = folder, folder / part
        with world_errors(folder):
            if folder.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            folder.mkdir(exist_ok=True)
            fsync_directory(above)


def write_fully(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data` where the file stands."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_file(path: Path, data: bytes, partial: Path | None = None) -> None:
    """Write a small file so that its name always means all of it; the name itself is not yet durable.

    Parameters
    ----------
    partial
        Its path until it is finished; default: next to it.
    """
    partial = partial or path.with_name(path.name + PARTIAL)
    with world_errors(path):
        descriptor = os.open(
            partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666
        )
        try:
            write_fully(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
