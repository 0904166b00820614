"""Read large ranges of inputs into buffers: past the page cache, through it, from a memory map, or from a store.

Reading past the cache is the default: it is as fast, at a tenth of the CPU time. Data that are already cached, or will be
read again, go through the cache. Where the bytes lie is the business of the file that is opened (`volumes.InputFile`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Literal

from streammerge.errors import ModelError, StreammergeError, WorldError, printable
from streammerge.io.buffer_pool import Bytes
from streammerge.io.direct import place_in_page
from streammerge.io.local_file import LocalFile
from streammerge.io.pages import DIRECT_BYTES, PAGE, slot_bytes
from streammerge.io.volumes import InputFile, volume_of

IoMode = Literal["direct", "read", "mmap"]
"""``direct``: past the page cache where that pays; ``read``: through it; ``mmap``: from a memory map."""
_OPEN_FILES = 48
"""Default number of open files; each has two descriptors."""
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
        self._files: OrderedDict[str, InputFile] = OrderedDict()
        self._kept: set[tuple[str, int, int]] = set()
        self.bytes_read = 0
        self.stop = threading.Event()
        """Set when a merge stops, so that nobody waits any more for a store that is away; the engine gives its own."""
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
                file.read_mapped(offset, target)
            else:
                file.read(offset, target)
        self._count(target.size)

    def read_parts(self, path: str, parts: Iterable[tuple[int, list[memoryview]]]) -> None:
        """Fill buffers from a file: for each offset, several buffers with consecutive bytes.

        Raises
        ------
        WorldError
            As `read_into`.
        """
        with self._open(path) as file, _reading(path):
            total = file.read_parts(parts)
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
                not file.direct
                or (not self._from_disk and file.cached_share(offset, nbytes) > 0.5)
                or (again and self._keep(key))
            )
            if buffered:
                self._forget(file, offset, nbytes)
                file.read(offset, slot[:nbytes])
                if not again:
                    self._release(file, key)
                begins = 0
            else:
                begins = offset % PAGE
                file.read_past_cache(offset, slot[: slot_bytes(nbytes)], nbytes)
        self._count(nbytes)
        return begins

    def _forget(self, file: InputFile, offset: int, nbytes: int) -> None:
        """With `from_disk`, evict a range from the page cache, so that it is read from the disk."""
        if self._from_disk:
            file.forget(offset, nbytes)

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

    def _release(self, file: InputFile, key: tuple[str, int, int]) -> None:
        """Evict a range that we put into the page cache; pages cached by others stay."""
        with self._lock:
            if key not in self._kept:
                return
            self._kept.discard(key)
            self._cache_left += key[2]
        file.forget(key[1], key[2])

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.bytes_read += nbytes

    def prefetch(self, path: str, offset: int, nbytes: int) -> None:
        """Ask the kernel to prefetch a range of a file into the page cache, if it is read through the cache.

        It is only a hint; failures show when the range is read.
        """
        try:
            with self._open(path) as file:
                if not file.direct or not self._goes_direct(nbytes):
                    file.will_need(offset, nbytes)
        except (OSError, StreammergeError):
            return

    def prefetch_file(self, path: str) -> None:
        """Prefetch a whole file that is read only once."""
        try:
            with closing(self._opened(path)) as file:
                nbytes = file.status().st_size
                if not file.direct or not self._goes_direct(nbytes):
                    file.will_need(0, 0)
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
        with closing(self._opened(path)) as file, _reading(path):
            nbytes = file.status().st_size
            if nbytes > target.size:
                raise ModelError(f"{printable(path)}: {nbytes} bytes, which is too large")
            direct = file.direct and self._goes_direct(nbytes) and not place_in_page(target)
            if direct and target.size >= slot_bytes(nbytes) and file.cached_share(0, nbytes) <= 0.5:
                file.read_past_cache(0, target, nbytes)
            else:
                file.read(0, target[:nbytes])
        self._count(nbytes)
        return nbytes

    @contextmanager
    def _open(self, path: str) -> Iterator[InputFile]:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = self._opened(path)
            self._files.move_to_end(path)
            file.users += 1
            self._close_idle(self._most_open)
        try:
            yield file
        finally:
            with self._lock:
                file.users -= 1

    def _opened(self, path: str) -> InputFile:
        volume = volume_of(path)
        return (
            LocalFile(path, direct=self._backend == "direct")
            if volume is None
            else volume.input_file(path, self.stop)
        )

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


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorldError(
            f"{printable(path)}: cannot be read: {error.strerror}; check the disk; finished work is kept; run the same "
            "command again"
        ) from error
