"""Bytes in: large positioned reads into buffers, or copies out of a memory map.

Measured on one machine, cold, the same: positioned reads are the default because a file that
shrinks gives a short read, an error we report, where a map gives SIGBUS, which kills the process.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from streammerge.engine.memory import Bytes
from streammerge.errors import ModelError, StreammergeError, WorldError, printable
from streammerge.index.header import FileStamp, open_regular

Backend = Literal["read", "mmap"]
_OPEN_FILES = 128


class Reader:
    """Reads ranges of input files from any thread, a bounded number of them open.

    Attributes
    ----------
    bytes_read
        Total so far.
    """

    def __init__(self, backend: Backend = "read") -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._files: OrderedDict[str, int] = OrderedDict()
        self._users: dict[str, int] = {}
        self.bytes_read = 0

    def read_into(self, path: str, offset: int, target: Bytes) -> None:
        """Fill `target` from byte `offset` of a file.

        Raises
        ------
        WorldError
            If the file ends early or the device fails.
        """
        with self._descriptor(path) as descriptor:
            try:
                if self._backend == "mmap":
                    _copy_from_map(descriptor, offset, target, path)
                else:
                    _read_fully(descriptor, offset, target, path)
            except OSError as error:
                raise WorldError(f"{printable(path)}: cannot be read: {error.strerror}") from error
        with self._lock:
            self.bytes_read += target.size

    def prefetch(self, path: str, offset: int, nbytes: int) -> None:
        """Ask the kernel to begin reading a range of a file; a hint, so failures show when it is read."""
        try:
            with self._descriptor(path) as descriptor:
                os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)
        except (OSError, StreammergeError):
            return

    def prefetch_file(self, path: str) -> None:
        """The same for a whole file that is read but once."""
        try:
            descriptor = open_regular(path)
        except (OSError, StreammergeError):
            return
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)

    def read_file(self, path: str, target: Bytes) -> int:
        """Read a whole file that fits into `target`; return its bytes.

        Raises
        ------
        ModelError
            If it is missing, no regular file, or larger than anything that was stored so.
        WorldError
            If the device fails.
        """
        descriptor = open_regular(path)
        try:
            nbytes = os.fstat(descriptor).st_size
            if nbytes > target.size:
                raise ModelError(f"{printable(path)}: {nbytes} bytes, larger than it can be")
            _read_fully(descriptor, 0, target[:nbytes], path)
        except OSError as error:
            raise WorldError(f"{printable(path)}: cannot be read: {error.strerror}") from error
        finally:
            os.close(descriptor)
        with self._lock:
            self.bytes_read += nbytes
        return nbytes

    @contextmanager
    def _descriptor(self, path: str) -> Iterator[int]:
        with self._lock:
            descriptor = self._files.get(path)
            if descriptor is None:
                descriptor = self._files[path] = open_regular(path)
                self._users[path] = 0
            self._files.move_to_end(path)
            self._users[path] += 1
            self._close_idle(_OPEN_FILES)
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users[path] -= 1

    def _close_idle(self, keep: int) -> None:
        for path in list(self._files):
            if len(self._files) <= keep:
                return
            if not self._users[path]:
                os.close(self._files.pop(path))

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            self._close_idle(0)


def _read_fully(descriptor: int, offset: int, target: Bytes, path: str) -> None:
    view = target.data
    position = 0
    while position < len(view):
        # Linux moves at most 2 GiB a call, and may move less.
        n = os.preadv(descriptor, [view[position : position + (1 << 30)]], offset + position)
        if n == 0:
            raise _shrunk(path)
        position += n


def _copy_from_map(descriptor: int, offset: int, target: Bytes, path: str) -> None:
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    length = offset - start + target.size
    if not target.size:
        return
    if os.fstat(descriptor).st_size < start + length:
        raise _shrunk(path)
    with mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=start) as mapped:
        target.data[:] = memoryview(mapped)[offset - start : length]


def _shrunk(path: str) -> WorldError:
    return WorldError(f"{printable(path)}: the file became shorter while it was read")


def check_unchanged(stamp: FileStamp) -> None:
    """Raise WorldError if an input file is no longer the one whose header was read."""
    try:
        now = os.stat(stamp.path)
    except OSError as error:
        reason = "is gone" if error.errno == errno.ENOENT else str(error.strerror)
        raise WorldError(f"{printable(stamp.path)}: an input {reason}; restore it and run again") from None
    known = (stamp.nbytes, stamp.mtime_ns, stamp.inode)
    if (now.st_size, now.st_mtime_ns, now.st_ino) != known or now.st_ctime_ns != stamp.ctime_ns:
        raise WorldError(
            f"{printable(stamp.path)}: an input changed while it was merged; start again with --overwrite"
        )
