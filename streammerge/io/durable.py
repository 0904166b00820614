"""Changes to the file system that survive a loss of power, and one-line errors for failures of the machine.

All writers follow two rules. A final name means a finished file: data are written and synced under a temporary name first.
A failed sync is never retried, since the system has dropped the unwritten pages and would report success; the next run
writes the data again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streammerge.errors import WorldError, printable

PARTIAL = ".partial"
"""Suffix of unfinished files."""

_KEPT = "finished work is kept; run the same command again"
_FULL = "free some space and run the same command again"
_LOCKED = "make it writable and run the same command again, or choose a different OUT"
_CURES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "raise the limit (`ulimit -f`, or the file system's) and run the same command again, or start over "
    "with a smaller --shard-size and --overwrite",
    errno.EROFS: _LOCKED,
    errno.EACCES: _LOCKED,
    errno.EPERM: _LOCKED,
    errno.EIO: f"check the disk; {_KEPT}",
    errno.ELOOP: "links are not followed here; remove it and run the same command again",
    errno.ENAMETOOLONG: "choose a shorter OUT",
    errno.ENOTDIR: "choose a different OUT",
}


def cure_of(error: OSError, otherwise: str) -> str:
    """Return the cure of a failure before anything was written."""
    return _CURES.get(error.errno or 0, otherwise).removesuffix(f"; {_KEPT}")


@contextmanager
def world_errors(what: object) -> Iterator[None]:
    """Convert an OSError to a WorldError that names the file and the cure."""
    try:
        yield
    except OSError as error:
        cure = _CURES.get(error.errno or 0, _KEPT)
        raise WorldError(f"{printable(what)}: {error.strerror or error}; {cure}") from error


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable, if the file system supports it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems: their server ensures it
            raise
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory and its parents, and make their names durable.

    Existing ones are synced too, since the process that created them may have been killed before its sync.
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
            continue  # we created nothing in a directory that we may not read


def make_folders(out: Path, name: str) -> None:
    """Create the folders of a path inside a directory, and make their names durable; none may be a link.

    Raises
    ------
    WorldError
        If that fails.
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
    """Write all of `data` at the file's current position."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def write_file(path: Path, data: bytes, partial: Path | None = None) -> None:
    """Write a small file whose name appears only when it is complete; the name is not yet durable.

    Parameters
    ----------
    partial
        Path until the file is finished; default: next to it.
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
