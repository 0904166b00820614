"""The identity of an input file, with which changes are detected."""

from __future__ import annotations

import errno
import hashlib
import os

from streammerge.errors import WorldError, printable
from streammerge.io import volumes
from streammerge.io.volumes import Status
from streammerge.records import dataclass


@dataclass(frozen=True, slots=True)
class FileStamp:
    """The identity of an input file; if any field differs on resume, the input has changed."""

    path: str
    nbytes: int
    mtime_ns: int
    ctime_ns: int
    """Unlike mtime it cannot be set back, so it reveals changes that keep size and mtime."""
    inode: int
    header_digest: str
    """BLAKE2b-128 of the header's JSON bytes, in hex."""

    @classmethod
    def of(cls, path: str | os.PathLike[str], status: Status, header: bytes | None = None) -> FileStamp:
        """Return the stamp of an open file from its status and its header's bytes."""
        digest = "" if header is None else hashlib.blake2b(header, digest_size=16).hexdigest()
        return cls(
            os.fspath(path),
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
            digest,
        )

    def describes(self, status: Status) -> bool:
        """Return whether a file with this `status` is still the stamped one, as far as stat can tell."""
        return (self.nbytes, self.mtime_ns, self.ctime_ns, self.inode) == (
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
        )


def check_unchanged(stamp: FileStamp) -> None:
    """Raise WorldError if an input file is no longer the one whose header was read."""
    try:
        now = volumes.stat(stamp.path, anew=True)
    except OSError as error:
        reason = "is gone" if error.errno == errno.ENOENT else str(error.strerror)
        raise WorldError(
            f"{printable(stamp.path)}: an input {reason}: restore it and start over with --overwrite"
        ) from None
    if not stamp.describes(now):
        raise changed(stamp.path)


def changed(path: str) -> WorldError:
    """Return the error for an input that changed during the merge."""
    return WorldError(f"{printable(path)}: an input changed during the merge: start over with --overwrite")
