"""Bytes in: large positioned reads into buffers, past the page cache, through it, or out of a memory map.

Reads past the cache are the default: as fast as others, at a tenth of the CPU time. What lies in the
cache already, or is to be read again, goes through it. A map is the last choice: a file that shrinks gives a
short read, an error we report, where touching a map gives SIGBUS, which kills the process; so the system copies
out of it for us (`mapped`).
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Literal

import numpy as np

from streammerge.errors import ModelError, StreammergeError, WorldError, printable
from streammerge.io.buffer_pool import Bytes
from streammerge.io.direct import (
    REFUSED,
    cached_share,
    open_direct,
    place_in_page,
    read_direct,
)
from streammerge.io.files import open_regular
from streammerge.io.mapped import copy_mapped
from streammerge.io.pages import DIRECT_BYTES, PAGE, slot_bytes

IoMode = Literal["direct", "read", "mmap"]
"""Past the page cache where that pays; through it; out of a memory map."""
_OPEN_FILES = 48
"""Unless told otherwise; twice as many descriptors."""
_MOST_VIEWS = 1024
"""Buffers that one call of the system fills."""
_GRAIN = 8
"""Kernels look at the buffer as words of up to this many bytes."""


class Reader:
    """Reads ranges of input files from any thread, a bounded number of them open.

    Parameters
    ----------
    cache_bytes
        How much of what will be read again may be left in the page cache meanwhile.
    most_open
        Files that may be open at a time, beside those being read.
    from_disk
        Read what the disk holds, not what the page cache still has of it, so far as the file system allows.

    Attributes
    ----------
    bytes_read
        Total so far.
    """

    def __init__(
        self,
        backend: IoMode = "direct",
        cache_bytes: int = 0,
        *,
        most_open: int = _OPEN_FILES,
        from_disk: bool = False,
    ) -> None:
        self._backend = backend
        self._from_disk = from_disk
        self._cache_left = cache_bytes
        self._most_open = most_open
        self._lock = threading.Lock()
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._kept: set[tuple[str, int, int]] = set()
        self.bytes_read = 0
        self.computes: Any = None
        """What computes tensors that lie in no file and need more than a reader; the engine sets it."""

    def read_into(self, path: str, offset: int, target: Bytes) -> None:
        """Fill `target` from byte `offset` of a file.

        Raises
        ------
        WorldError
            If the file ends early or the device fails.
        """
        with self._open(path) as file, _reading(path):
            self._forget(file, offset, target.size)
            if self._backend == "mmap":
                _copy_from_map(file.descriptor, offset, target, path)
            else:
                _read_fully(file.descriptor, offset, target, path)
        self._count(target.size)

    def read_parts(self, path: str, parts: Iterable[tuple[int, list[memoryview]]]) -> None:
        """Fill buffers, several from each of some offsets of a file: one behind the other there, anywhere here.

        Raises
        ------
        WorldError
            As `read_into`.
        """
        total = 0
        with self._open(path) as file, _reading(path):
            for offset, views in parts:
                for first in range(0, len(views), _MOST_VIEWS):
                    some = views[first : first + _MOST_VIEWS]
                    wanted = sum(map(len, some))
                    n = os.preadv(file.descriptor, some, offset)
                    if n < wanted:  # a signal, or the end
                        position = 0
                        for view in some:
                            _read_fully(
                                file.descriptor, offset + position, np.frombuffer(view, np.uint8), path
                            )
                            position += len(view)
                    offset += wanted
                    total += wanted
        self._count(total)

    def read_slot(self, path: str, offset: int, nbytes: int, slot: Bytes, *, again: bool = False) -> int:
        """Read a range of a file into a slot (see `streammerge.planning.memory.buffers`); return where in the slot the data begin.

        Parameters
        ----------
        again
            The range will be read once more.

        Raises
        ------
        WorldError
            As `read_into`.
        """
        if not self._goes_direct(nbytes) or offset % _GRAIN or place_in_page(slot):
            self.read_into(path, offset, slot[:nbytes])
            return 0
        key = path, offset, nbytes
        with self._open(path) as file, _reading(path):
            buffered = (
                file.direct is None
                or (not self._from_disk and cached_share(file.descriptor, offset, nbytes) > 0.5)
                or (again and self._keep(key))
            )
            if buffered:
                self._forget(file, offset, nbytes)
                _read_fully(file.descriptor, offset, slot[:nbytes], path)
                if not again:
                    self._release(file, key)
                begins = 0
            else:
                begins = offset % PAGE
                _read_past_cache(file, offset, slot[: slot_bytes(nbytes)], nbytes, path)
        self._count(nbytes)
        return begins

    def _forget(self, file: _File, offset: int, nbytes: int) -> None:
        """Have a range read from the disk, where that is asked for: nothing of it is left in the page cache."""
        if self._from_disk:
            os.posix_fadvise(file.descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _goes_direct(self, nbytes: int) -> bool:
        return self._backend == "direct" and nbytes >= DIRECT_BYTES

    def _keep(self, key: tuple[str, int, int]) -> bool:
        """Return whether a range that will be read again may stay in the page cache; remember it if so."""
        with self._lock:
            if key[2] > self._cache_left:
                return False
            self._cache_left -= key[2]
            self._kept.add(key)
            return True

    def _release(self, file: _File, key: tuple[str, int, int]) -> None:
        """Give up the page cache of a range that we put there; what others had there stays."""
        with self._lock:
            if key not in self._kept:
                return
            self._kept.discard(key)
            self._cache_left += key[2]
        os.posix_fadvise(file.descriptor, key[1], key[2], os.POSIX_FADV_DONTNEED)

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.bytes_read += nbytes

    def prefetch(self, path: str, offset: int, nbytes: int) -> None:
        """Ask the kernel to begin reading a range of a file into the page cache, if it is read through it.

        A hint, so failures show when it is read.
        """
        try:
            with self._open(path) as file:
                if file.direct is None or not self._goes_direct(nbytes):
                    os.posix_fadvise(file.descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)
        except (OSError, StreammergeError):
            return

    def prefetch_file(self, path: str) -> None:
        """The same for a whole file that is read but once."""
        try:
            with closing(_File(path, self._backend)) as file:
                nbytes = os.fstat(file.descriptor).st_size
                if file.direct is None or not self._goes_direct(nbytes):
                    os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        except (OSError, StreammergeError):
            return

    def read_file(self, path: str, target: Bytes) -> int:
        """Read a whole file that fits into `target`, with whole pages to spare; return its bytes.

        Raises
        ------
        ModelError
            If it is missing, no regular file, or larger than anything that was stored so.
        WorldError
            If the device fails.
        """
        with closing(_File(path, self._backend)) as file, _reading(path):
            nbytes = os.fstat(file.descriptor).st_size
            if nbytes > target.size:
                raise ModelError(f"{printable(path)}: {nbytes} bytes, larger than it can be")
            direct = file.direct is not None and self._goes_direct(nbytes) and not place_in_page(target)
            if (
                direct
                and target.size >= slot_bytes(nbytes)
                and cached_share(file.descriptor, 0, nbytes) <= 0.5
            ):
                _read_past_cache(file, 0, target, nbytes, path)
            else:
                _read_fully(file.descriptor, 0, target[:nbytes], path)
        self._count(nbytes)
        return nbytes

    @contextmanager
    def _open(self, path: str) -> Iterator[_File]:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _File(path, self._backend)
            self._files.move_to_end(path)
            file.users += 1
            self._close_idle(self._most_open)
        try:
            yield file
        finally:
            with self._lock:
                file.users -= 1

    def _close_idle(self, keep: int) -> None:
        for path in list(self._files):
            if len(self._files) <= keep:
                return
            if not self._files[path].users:
                self._files.pop(path).close()

    def close(self) -> None:
        """Close all files."""
        if self.computes is not None:
            self.computes.close()
        with self._lock:
            self._close_idle(0)


class _File:
    """An input file, open through the page cache and, where that is to be had, past it."""

    def __init__(self, path: str, backend: IoMode) -> None:
        self.descriptor = open_regular(path)
        self.direct = open_direct(self.descriptor, os.O_RDONLY) if backend == "direct" else None
        self.users = 0

    def close(self) -> None:
        """Close it."""
        os.close(self.descriptor)
        if self.direct is not None:
            os.close(self.direct)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorldError(
            f"{printable(path)}: cannot be read: {error.strerror}; check the disk; what is finished is kept; run the same "
            "command again"
        ) from error


def _read_past_cache(file: _File, offset: int, slot: Bytes, nbytes: int, path: str) -> None:
    """Read a range into the slot, from where it lies in its page; what direct I/O leaves, through the cache."""
    assert file.direct is not None
    done = 0
    try:
        done = read_direct(file.direct, offset, nbytes, slot)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
    if done < nbytes:
        lead = offset % PAGE
        _read_fully(file.descriptor, offset + done, slot[lead + done : lead + nbytes], path)


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
    try:
        mapped = mmap.mmap(descriptor, length, access=mmap.ACCESS_READ, offset=start)
    except ValueError:  # it became shorter since
        raise _shrunk(path) from None
    with mapped:
        done = copy_mapped(mapped, offset - start, target)
    if done < target.size:
        # The file became shorter since, or the system does not copy so: reading tells.
        _read_fully(descriptor, offset + done, target[done:], path)


def _shrunk(path: str) -> WorldError:
    return WorldError(
        f"{printable(path)}: the file became shorter while it was read; restore it and start again with --overwrite"
    )
