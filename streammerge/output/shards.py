"""Output shards: preallocated, written in place at final offsets, and renamed when everything is durable."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from streammerge.errors import OutputError, printable
from streammerge.io.allocate import allocate, check_space
from streammerge.io.buffer_pool import Bytes
from streammerge.io.direct import REFUSED, open_direct, place_in_page, write_direct
from streammerge.io.durable import fsync_directory, make_folders, world_errors
from streammerge.io.pages import DIRECT_BYTES, PAGE
from streammerge.output.place import Place
from streammerge.planning.layout import Layout, Shard

_AT_ONCE = 1 << 30
"""Linux transfers at most 2 GiB per call."""


class Sink(Protocol):
    """Receives merged bytes; may be used from many threads."""

    bytes_written: int

    def write(self, shard: int, offset: int, data: Bytes) -> None:
        """Receive bytes at an absolute offset of a shard."""

    def sync(self, shards: set[int]) -> None:
        """Make everything received for some shards durable."""

    def early(self) -> Sink:
        """Return a sink that keeps only what this one needs before it comes in order."""


class NoSink:
    """Accepts no bytes: the sink of a run that writes nothing."""

    bytes_written = 0

    def write(self, shard: int, offset: int, data: Bytes) -> None:
        """See `Sink`."""
        raise AssertionError("this run writes nothing")

    def sync(self, shards: set[int]) -> None:
        """See `Sink`."""

    def early(self) -> Sink:
        """See `Sink`."""
        return self


class ShardWriter:
    """The open shards of one merge.

    Parameters
    ----------
    place
        Where the output lies.
    layout
        The layout of the output.
    direct
        Whether to write past the page cache where the file system supports it.
    """

    def __init__(self, place: Place, layout: Layout, *, direct: bool) -> None:
        self._place = place
        self._direct = direct
        self._direct_descriptors: dict[int, int | None] = {}
        self._layout = layout
        self._shards = layout.shards
        self._descriptors: dict[int, int] = {}
        self.fresh: set[int] = set()
        """Shards without data: new ones, and invalid ones that were recreated."""
        self.bytes_written = 0
        self.unreserved = False
        """Whether the file system could not reserve space; a full disk is then detected only when it is full."""

    @classmethod
    def attach(cls, place: Place, layout: Layout, *, direct: bool) -> ShardWriter:
        """Return a writer to shards that the merge has already opened; nothing is created, renamed or allocated.

        Raises
        ------
        WorldError
            If one is missing.
        """
        writer = cls(place, layout, direct=direct)
        try:
            for number, shard in enumerate(layout.shards):
                with world_errors(place.path(shard.name)):
                    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
                    writer._take(number, os.open(writer._partial(number), flags))
        except BaseException:
            writer.close()
            raise
        return writer

    def _take(self, number: int, descriptor: int) -> None:
        self._descriptors[number] = descriptor
        self._direct_descriptors[number] = open_direct(descriptor, os.O_RDWR) if self._direct else None

    def open(self, *, anew: bool = False) -> None:
        """Open or create every shard at its full size; a full disk is detected here.

        Shards with final names from an earlier run become partial again until everything is finished: no file is written
        under its final name, and a name that may not be durable is given again.

        Parameters
        ----------
        anew
            Whether the merge starts over: a file that lies there belongs to a host that began at the same moment, and is
            replaced.
        """
        check_space(self._place.out, self._layout.sizes, self._place.paths)
        try:
            for number, shard in enumerate(self._shards):
                with world_errors(self._final(number)):
                    descriptor = self._open_one(number, shard, anew)
                self._take(number, descriptor)
            for folder in sorted(self._folders(), reverse=True):
                with world_errors(folder):
                    fsync_directory(folder)
        except BaseException:
            self._free_space()
            raise

    def _open_one(self, number: int, shard: Shard, anew: bool) -> int:
        final, partial = self._final(number), self._partial(number)
        make_folders(self._place.folder, shard.name)
        if final.exists() and not anew:
            os.replace(final, partial)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        if partial.exists() and not anew:
            descriptor = os.open(partial, flags)
            if not begins_as(descriptor, shard):
                os.close(descriptor)
                partial.unlink()
                return self._open_one(number, shard, anew)
        else:
            # Two hosts whose locks mean nothing to each other never write into one file.
            private = self._place.private(shard.name)
            descriptor = os.open(private, flags | os.O_CREAT | os.O_EXCL, 0o666)
            os.replace(private, partial)
            self.fresh.add(number)
        try:
            if number in self.fresh:
                self.unreserved |= not allocate(descriptor, shard.nbytes)
            # Also an existing shard's header: after a failed sync it may be in the page cache but not on the disk.
            write_all(descriptor, shard.header, 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _final(self, number: int) -> Path:
        return self._place.path(self._shards[number].name)

    def _partial(self, number: int) -> Path:
        return self._place.partial(self._shards[number].name)

    def _folders(self) -> set[Path]:
        numbers = range(len(self._shards))
        return {path(number).parent for number in numbers for path in (self._final, self._partial)}

    def _free_space(self) -> None:
        """Remove the shards that `open` created, so that the disk does not stay full."""
        for number in self.fresh:
            with suppress(OSError):
                self._partial(number).unlink()

    def write(self, shard: int, offset: int, data: Bytes) -> None:
        """Write bytes at an absolute offset of a shard."""
        with world_errors(self._final(shard)):
            direct = self._direct_descriptors[shard]
            lead = -offset % PAGE
            if direct is None or data.size < DIRECT_BYTES or place_in_page(data) != offset % PAGE:
                self._write_cached(shard, offset, data)
            else:
                # Pages shared with other pieces go through the page cache, which combines them.
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
        write_all(self._descriptors[shard], data.data, offset)

    def read(self, shard: int, offset: int, nbytes: int) -> bytes:
        """Read back bytes of a shard."""
        with world_errors(self._final(shard)):
            return os.pread(self._descriptors[shard], nbytes, offset)

    def early(self) -> Sink:
        """See `Sink`: bytes are taken in any order."""
        return self

    def sync(self, shards: set[int]) -> None:
        """Make everything written to some shards durable. A failure is final, since a retry cannot be trusted."""
        for shard in shards:
            with world_errors(self._final(shard)):
                os.fdatasync(self._descriptors[shard])

    def publish(self, shard: int) -> None:
        """Make a shard durable and give it its final name."""
        name = self._final(shard)
        with world_errors(name):
            os.fsync(self._descriptors[shard])
            if not os.path.samestat(os.stat(self._partial(shard)), os.fstat(self._descriptors[shard])):
                raise OutputError(
                    f"{printable(name)}: a different merge has put its own file there meanwhile: this one is stopped"
                )
            os.replace(self._partial(shard), name)
            if name.parent != self._place.folder:
                fsync_directory(name.parent)

    def close(self) -> None:
        """Close all shards."""
        for number in list(self._descriptors):
            self._close_one(number)

    def _close_one(self, number: int) -> None:
        os.close(self._descriptors.pop(number))
        if (direct := self._direct_descriptors.pop(number)) is not None:
            os.close(direct)


def begins_as(descriptor: int, shard: Shard) -> bool:
    """Return whether a file has a shard's size and header; an unreadable file has not."""
    try:
        whole = os.fstat(descriptor).st_size == shard.nbytes
        return whole and os.pread(descriptor, len(shard.header), 0) == shard.header
    except OSError:
        return False


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at an offset of a file."""
    view = memoryview(data)
    position = 0
    while position < len(view):
        position += os.pwrite(descriptor, view[position : position + _AT_ONCE], offset + position)
