"""An input file of this machine: read past the page cache, through it, or from a memory map.

A memory map is the last choice: a file that shrinks gives a short read, which we report, but a map raises SIGBUS, which
kills the process; so the system copies from the map (`mapped`).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable

import numpy as np

from streammerge.errors import WorldError, printable
from streammerge.io.buffer_pool import Bytes
from streammerge.io.direct import REFUSED, cached_share, open_direct, read_direct
from streammerge.io.files import open_regular
from streammerge.io.mapped import copy_mapped
from streammerge.io.pages import PAGE

_MOST_VIEWS = 1024
"""Most buffers that one system call fills."""


class LocalFile:
    """An input file, open through the page cache and, if asked for and supported, past it.

    Raises
    ------
    ModelError
        If it is missing, not permitted, or not a regular file.
    WorldError
        If the machine fails.
    """

    def __init__(self, path: str, *, direct: bool) -> None:
        self._path = path
        self._descriptor = open_regular(path)
        self._direct = open_direct(self._descriptor, os.O_RDONLY) if direct else None
        self.direct = self._direct is not None
        self.users = 0

    def status(self) -> os.stat_result:
        """See `InputFile`."""
        return os.fstat(self._descriptor)

    def read(self, offset: int, target: Bytes) -> None:
        """See `InputFile`."""
        view = target.data
        position = 0
        while position < len(view):
            # Linux transfers at most 2 GiB per call, and possibly less.
            n = os.preadv(self._descriptor, [view[position : position + (1 << 30)]], offset + position)
            if n == 0:
                raise shrunk(self._path)
            position += n

    def read_mapped(self, offset: int, target: Bytes) -> None:
        """See `InputFile`."""
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        length = offset - start + target.size
        if not target.size:
            return
        if os.fstat(self._descriptor).st_size < start + length:
            raise shrunk(self._path)
        try:
            mapped = mmap.mmap(self._descriptor, length, access=mmap.ACCESS_READ, offset=start)
        except ValueError:  # it was truncated in the meantime
            raise shrunk(self._path) from None
        with mapped:
            done = copy_mapped(mapped, offset - start, target)
        if done < target.size:
            # The file was truncated, or the system cannot copy this way: a plain read tells which.
            self.read(offset + done, target[done:])

    def read_parts(self, parts: Iterable[tuple[int, list[memoryview]]]) -> int:
        """See `InputFile`."""
        return sum(self._read_views(offset, views) for offset, views in parts)

    def _read_views(self, offset: int, views: list[memoryview]) -> int:
        total = 0
        for first in range(0, len(views), _MOST_VIEWS):
            some = views[first : first + _MOST_VIEWS]
            wanted = sum(map(len, some))
            n = os.preadv(self._descriptor, some, offset)
            if n < wanted:  # a signal, or the end
                position = 0
                for view in some:
                    self.read(offset + position, np.frombuffer(view, np.uint8))
                    position += len(view)
            offset += wanted
            total += wanted
        return total

    def read_past_cache(self, offset: int, slot: Bytes, nbytes: int) -> None:
        """See `InputFile`; the bytes that direct I/O does not give are read through the cache."""
        assert self._direct is not None
        done = 0
        try:
            done = read_direct(self._direct, offset, nbytes, slot)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
        if done < nbytes:
            lead = offset % PAGE
            self.read(offset + done, slot[lead + done : lead + nbytes])

    def cached_share(self, offset: int, nbytes: int) -> float:
        """See `InputFile`."""
        return cached_share(self._descriptor, offset, nbytes)

    def will_need(self, offset: int, nbytes: int) -> None:
        """See `InputFile`."""
        os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def forget(self, offset: int, nbytes: int) -> None:
        """See `InputFile`."""
        os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """See `InputFile`."""
        os.close(self._descriptor)
        if self._direct is not None:
            os.close(self._direct)


def shrunk(path: str) -> WorldError:
    """Return the error for a file that ends earlier than when the merge was planned."""
    return WorldError(
        f"{printable(path)}: the file became shorter while it was read: restore it and start over with --overwrite"
    )
