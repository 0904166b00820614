"""Open input files so that nothing in a model directory can hang us or blur what went wrong.

Only regular files are opened. What the user can cure (a missing file, a wrong kind, no permission)
is a `ModelError`; what the machine did (an I/O error, too many open files) is a `WorldError`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from streammerge.errors import ModelError, StreammergeError, WorldError, printable

_CURABLE = {
    errno.ENOENT: "no such file or directory",
    errno.ENOTDIR: "a part of this path is a file, not a directory",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ELOOP: "a symbolic link that leads back to itself",
    errno.ENAMETOOLONG: "the file name is too long",
    errno.EISDIR: "a directory, not a file",
    errno.ENXIO: "not a regular file",
    errno.ENODEV: "not a regular file",
    errno.EINVAL: "not a valid path",
}
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def place(path: str, limit: int = 200) -> str:
    """Return `path` fit for one line; of a very long one the end, where the file name is."""
    return printable(path, limit) if len(path) <= limit else "…" + printable(path[1 - limit :])


def quoted(text: str, limit: int = 120) -> str:
    """Return untrusted `text` in quotes, escaped and cut; never touches more than `limit` of it."""
    return repr(text) if len(text) <= limit else repr(text[:limit]) + "…"


def bad(path: str, what: str) -> ModelError:
    """Return the refusal of `path`: one bounded line ``<path>: <what>``."""
    return ModelError(f"{place(path)}: {printable(what, 600)}")


def from_os(path: str, error: OSError) -> StreammergeError:
    """Return `error` as ours: the user's to cure, or the machine's failure."""
    if error.errno == errno.ENOENT and os.path.islink(path):
        return bad(path, "a symbolic link to a file that is missing: download the model again")
    if error.errno in _CURABLE:
        return bad(path, _CURABLE[error.errno])
    return WorldError(f"{place(path)}: cannot read: {printable(error.strerror or error)}")


@contextmanager
def open_regular(path: str) -> Iterator[tuple[int, os.stat_result]]:
    """Open `path` for reading and yield its descriptor and status; closed on exit.

    Anything but a regular file (or a link to one) is refused, before it is opened: opening a device
    may have effects. The open itself does not block, should the file become a pipe in between.
    An `OSError` in the body is translated like one of the open.
    """
    try:
        before = os.stat(path)
    except OSError as error:
        raise from_os(path, error) from error
    except ValueError as error:  # A NUL or a lone surrogate, which no path can hold.
        raise bad(path, "not a valid path") from error
    _refuse_special(path, before)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            status = os.fstat(fd)
            _refuse_special(path, status)
            yield fd, status
        finally:
            os.close(fd)
    except OSError as error:
        raise from_os(path, error) from error


def _refuse_special(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise bad(path, f"{kind}, not a regular file")


def read_exactly(fd: int, nbytes: int, offset: int, path: str) -> bytes:
    """Return `nbytes` bytes at `offset`; the caller has checked that the file is that long.

    Raises
    ------
    WorldError
        If the file ends before: it was cut while we looked at it.
    """
    parts = []
    while nbytes:
        part = os.pread(fd, nbytes, offset)
        if not part:
            raise WorldError(f"{place(path)}: became shorter while it was read")
        parts.append(part)
        nbytes -= len(part)
        offset += len(part)
    return b"".join(parts)
