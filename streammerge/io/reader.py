"""Read large ranges of files into buffers: past the page cache, through it, or from a memory map.

Reading past the cache is the default: it is as fast, at a tenth of the CPU time. Data that are already cached, or will be
read again, go through the cache. A memory map is the last choice: a file that shrinks gives a short read, which we report,
but a map raises SIGBUS, which kills the process; so the system copies from the map (`mapped`).
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
"""``direct``: past the page cache where that pays; ``read``: through it; ``mmap``: from a memory map."""
_OPEN_FILES = 48
"""Default number of open files; each has two descriptors."""
_MOST_VIEWS = 1024
"""Most buffers that one system call fills."""
_GRAIN = 8
"""Alignment in bytes; kernels access the buffer in words of up to this size."""


class Reader:
    """Reads ranges of input files from any thread, with a bounded number of open files.

    Parameters
    ----------
    cache_bytes
        Most bytes to leave in the page cache for a second read.
    most_open
        Most open files in addition to those being read.
    from_disk
        Whether to read from the disk instead of the page cache, as far as the file system allows.

    Attributes
    ----------
    bytes_read
        Total bytes read so far.
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
        """Computes tensors that are in no file and need more than a reader; the engine sets it."""

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
        """Fill buffers from a file: for each offset, several buffers with consecutive bytes.

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
        """Read a range of a file into a slot (see `streammerge.planning.memory.buffers`); return the data's offset in it.

        Parameters
        ----------
        again
            Whether the range will be read once more.

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
        """With `from_disk`, evict a range from the page cache, so that it is read from the disk."""
        if self._from_disk:
            os.posix_fadvise(file.descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _goes_direct(self, nbytes: int) -> bool:
        return self._backend == "direct" and nbytes >= DIRECT_BYTES

    def _keep(self, key: tuple[str, int, int]) -> bool:
        """Return whether a range that will be read again may stay in the page cache, and record it if so."""
        with self._lock:
            if key[2] > self._cache_left:
                return False
            self._cache_left -= key[2]
            self._kept.add(key)
            return True

    def _release(self, file: _File, key: tuple[str, int, int]) -> None:
        """Evict a range that we put into the page cache; pages cached by others stay."""
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
        """Ask the kernel to prefetch a range of a file into the page cache, if it is read through the cache.

        It is only a hint; failures show when the range is read.
        """
        try:
            with self._open(path) as file:
                if file.direct is None or not self._goes_direct(nbytes):
                    os.posix_fadvise(file.descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)
        except (OSError, StreammergeError):
            return

    def prefetch_file(self, path: str) -> None:
        """Prefetch a whole file that is read only once."""
        try:
            with closing(_File(path, self._backend)) as file:
                nbytes = os.fstat(file.descriptor).st_size
                if file.direct is None or not self._goes_direct(nbytes):
                    os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        except (OSError, StreammergeError):
            return

    def read_file(self, path: str, target: Bytes) -> int:
        """Read a whole file into `target`, which has whole pages to spare; return the file's size.

        Raises
        ------
        ModelError
            If it is missing, not a regular file, or too large.
        WorldError
            If the device fails.
        """
        with closing(_File(path, self._backend)) as file, _reading(path):
            nbytes = os.fstat(file.descriptor).st_size
            if nbytes > target.size:
                raise ModelError(f"{printable(path)}: {nbytes} bytes, which is too large")
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
    """An input file, open through the page cache and, if supported, past it."""

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
            f"{printable(path)}: cannot be read: {error.strerror}; check the disk; finished work is kept; run the same "
            "command again"
        ) from error


def _read_past_cache(file: _File, offset: int, slot: Bytes, nbytes: int, path: str) -> None:
    """Read a range into the slot by direct I/O; read the remaining bytes through the cache."""
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
        # Linux transfers at most 2 GiB per call, and possibly less.
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
    except ValueError:  # it was truncated in the meantime
        raise _shrunk(path) from None
    with mapped:
        done = copy_mapped(mapped, offset - start, target)
    if done < target.size:
        # The file was truncated, or the system cannot copy this way: a plain read tells which.
        _read_fully(descriptor, offset + done, target[done:], path)


def _shrunk(path: str) -> WorldError:
    return WorldError(
        f"{printable(path)}: the file became shorter while it was read: restore it and start over with --overwrite"
    )
