"""Open input files so that no file in a model directory can block us, with precise errors.

Only regular files are opened. Problems that the user can fix (a missing file, a wrong kind, no permission) raise
`ModelError`; failures of the machine (an I/O error, too many open files) raise `WorldError`.
"""

from __future__ import annotations

import difflib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from streammerge.errors import ModelError, StreammergeError, WorldError, printable
from streammerge.io.volumes import Opened, Status, volume_of

Handle = int | Opened
"""An open file: its descriptor, or an object of a volume."""

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
    """Return `path` for use in one line; of a very long path only the end, with the file name."""
    return printable(path, limit) if len(path) <= limit else "…" + printable(path[1 - limit :])


def quoted(text: str, limit: int = 120) -> str:
    """Return untrusted `text` in quotes, escaped and cut; at most `limit` characters are processed."""
    return repr(text) if len(text) <= limit else repr(text[:limit]) + "…"


def expanded(path: str) -> str:
    """Return a path with a leading ``~`` expanded, unless a file of that literal name exists."""
    return path if os.path.lexists(path) else os.path.expanduser(path)


def meant(path: str) -> str:
    """Return `` (did you mean …?)`` if a name like the last part of a missing `path` exists, else an empty string."""
    parent, name = os.path.split(path.rstrip("/"))
    try:
        beside = os.listdir(os.path.expanduser(parent) or ".")
    except (OSError, ValueError):
        return ""
    plain = {other.lower(): other for other in beside if not other.startswith(".")}
    close = difflib.get_close_matches(name.lower(), plain, 1, 0.7) if len(name) < 256 else []
    return f" (did you mean {place(os.path.join(parent, plain[close[0]]))}?)" if close else ""


def bad(path: str, what: str) -> ModelError:
    """Return the error for `path`: one bounded line ``<path>: <what>``."""
    return ModelError(f"{place(path)}: {printable(what, 600)}")


def from_os(path: str, error: OSError) -> StreammergeError:
    """Return `error` as a `ModelError` if the user can fix it, else as a `WorldError`."""
    if error.errno == errno.ENOENT and os.path.islink(path):
        return bad(path, "a symbolic link to a file that is missing: download the model again")
    if error.errno in _CURABLE:
        return bad(path, _CURABLE[error.errno])
    return WorldError(f"{place(path)}: cannot read: {printable(error.strerror or error)}")


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file (or a link to one) for reading and return its descriptor.

    Anything else is refused before it is opened, since opening a device may have effects. Opening does not block, even if
    the file is replaced by a pipe in between.

    Raises
    ------
    ModelError
        If it is missing, not permitted, or not a regular file.
    WorldError
        If the machine fails.
    """
    path = os.fspath(path)
    try:
        _refuse_special(path, os.stat(path))
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as error:
        raise from_os(path, error) from error
    except StreammergeError:
        raise
    except ValueError as error:  # A NUL or a lone surrogate, which no path can hold.
        raise bad(path, "not a valid path") from error
    try:
        _refuse_special(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def reading(path: str) -> Iterator[tuple[Handle, Status]]:
    """Yield the handle and the status of a regular file or an object; an `OSError` inside is converted by `from_os`."""
    if (volume := volume_of(path)) is not None:
        try:
            yield volume.opened(path)
        except OSError as error:
            raise from_os(path, error) from error
        return
    fd = open_regular(path)
    try:
        yield fd, os.fstat(fd)
    except OSError as error:
        raise from_os(path, error) from error
    finally:
        os.close(fd)


def _refuse_special(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise bad(path, f"{kind}, not a regular file")


def pread(handle: Handle, nbytes: int, offset: int) -> bytes:
    """Return up to `nbytes` bytes at `offset` of a file or an object; none at its end."""
    return os.pread(handle, nbytes, offset) if isinstance(handle, int) else handle.pread(nbytes, offset)


def read_exactly(fd: Handle, nbytes: int, offset: int, path: str) -> bytes:
    """Return `nbytes` bytes at `offset`; the caller has checked the file's size.

    Raises
    ------
    WorldError
        If the file ends earlier, because it was truncated in the meantime.
    """
    parts = []
    while nbytes:
        part = pread(fd, nbytes, offset)
        if not part:
            raise WorldError(f"{place(path)}: became shorter while it was read")
        parts.append(part)
        nbytes -= len(part)
        offset += len(part)
    return b"".join(parts)
