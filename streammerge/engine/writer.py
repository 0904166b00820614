"""Output shards: preallocated, written in place at final offsets, renamed when all is durable."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streammerge.engine.direct import REFUSED, open_direct, place_in_page, write_direct
from streammerge.engine.memory import Bytes
from streammerge.errors import WorldError, printable
from streammerge.plan.arena import DIRECT_BYTES, PAGE
from streammerge.plan.layout import Layout, Shard

PARTIAL = ".partial"


@contextmanager
def world_errors(what: object) -> Iterator[None]:
    """Turn an OSError into a WorldError that names what was being done and says it can be resumed."""
    try:
        yield
    except OSError as error:
        cure = "free some space and run the same command again" if error.errno in (
            errno.ENOSPC, errno.EDQUOT, errno.EFBIG
        ) else "what is finished is kept; run the same command again"  # fmt: skip
        raise WorldError(f"{printable(what)}: {error.strerror or error}; {cure}") from error


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardWriter:
    """The open shards of one merge.

    Parameters
    ----------
    directory
        The output directory.
    layout
        Where every byte goes.
    direct
        Write past the page cache where that is to be had.
    """

    def __init__(self, directory: Path, layout: Layout, *, direct: bool) -> None:
        self._directory = directory
        self._direct = direct
        self._direct_descriptors: list[int | None] = []
        self._shards = layout.shards
        self._descriptors: list[int] = []
        self.fresh: set[int] = set()
        """Shards that hold nothing yet: new, or not as they should be and made again."""
        self.bytes_written = 0

    def open(self) -> None:
        """Open or create every shard at its full size; a full disk is found here."""
        for number, shard in enumerate(self._shards):
            with world_errors(self._directory / shard.name):
                self._descriptors.append(self._open_one(number, shard))
            direct = open_direct(self._descriptors[-1], os.O_RDWR) if self._direct else None
            self._direct_descriptors.append(direct)
        with world_errors(self._directory):
            fsync_directory(self._directory)

    def _open_one(self, number: int, shard: Shard) -> int:
        final, partial = self._directory / shard.name, self._directory / (shard.name + PARTIAL)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        for path in (final, partial):
            if path.exists():
                descriptor = os.open(path, flags)
                whole = os.fstat(descriptor).st_size == shard.nbytes
                if whole and os.pread(descriptor, len(shard.header), 0) == shard.header:
                    return descriptor
                os.close(descriptor)
                path.unlink()
        self.fresh.add(number)
        descriptor = os.open(partial, flags | os.O_CREAT | os.O_EXCL, 0o666)
        _allocate(descriptor, shard.nbytes)
        os.pwrite(descriptor, shard.header, 0)
        return descriptor

    def write(self, shard: int, offset: int, data: Bytes) -> None:
        """Write bytes at an absolute offset of a shard."""
        with world_errors(self._directory / self._shards[shard].name):
            direct = self._direct_descriptors[shard]
            lead = -offset % PAGE
            if direct is None or data.size < DIRECT_BYTES or place_in_page(data) != offset % PAGE:
                self._write_cached(shard, offset, data)
            else:
                # Pages that other pieces have a part in go through the cache, where the parts meet.
                self._write_cached(shard, offset, data[:lead])
                done = lead + self._write_pages(shard, direct, offset + lead, data[lead:])
                self._write_cached(shard, offset + done, data[done:])
        self.bytes_written += data.size

    def _write_pages(self, shard: int, direct: int, offset: int, data: Bytes) -> int:
        try:
            return write_direct(direct, offset, data)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            self._direct_descriptors[shard] = None
            return 0

    def _write_cached(self, shard: int, offset: int, data: Bytes) -> None:
        view = data.data
        position = 0
        while position < len(view):
            position += os.pwrite(
                self._descriptors[shard], view[position : position + (1 << 30)], offset + position
            )

    def read(self, shard: int, offset: int, nbytes: int) -> bytes:
        """Read back bytes of a shard."""
        with world_errors(self._directory / self._shards[shard].name):
            return os.pread(self._descriptors[shard], nbytes, offset)

    def sync(self, shards: set[int]) -> None:
        """Make everything written to some shards durable. A failure is final: no retry could be trusted."""
        for shard in shards:
            with world_errors(self._directory / self._shards[shard].name):
                os.fdatasync(self._descriptors[shard])

    def publish(self, shard: int) -> None:
        """Give a durable shard its final name."""
        name = self._directory / self._shards[shard].name
        with world_errors(name):
            os.fsync(self._descriptors[shard])
            partial = name.with_name(name.name + PARTIAL)
            if partial.exists():
                os.replace(partial, name)

    def close(self) -> None:
        """Close all shards."""
        while self._descriptors:
            os.close(self._descriptors.pop())
        while self._direct_descriptors:
            if (direct := self._direct_descriptors.pop()) is not None:
                os.close(direct)


def _allocate(descriptor: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, nbytes)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file so that its name always means all of it: partial, fsync, rename."""
    partial = path.with_name(path.name + PARTIAL)
    with world_errors(path):
        descriptor = os.open(
            partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666
        )
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
