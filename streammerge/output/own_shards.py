"""Shards of an output that several processes write, each the shards that it has claimed, into files of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from streammerge.io.allocate import allocate
from streammerge.io.durable import fsync_directory, make_folders, world_errors
from streammerge.io.private import private
from streammerge.output.place import Place
from streammerge.output.shards import ShardWriter, begins_as, write_all
from streammerge.planning.layout import Layout
from streammerge.records import dataclass

_MTIME_SECONDS = 2.0
"""Difference between two hosts' views of a file's date that is no change."""


@dataclass(frozen=True)
class Written:
    """A finished file of a shard, which does not have its final name yet."""

    name: str
    """Path in the output."""
    nbytes: int
    mtime: float
    e_tag: str = ""
    """In a store, where a file has its final name at once."""

    def lies_in(self, folder: Path, final: str) -> bool:
        """Return whether the file is there as it was written, under its own name or already under its final one."""
        for name in (self.name, final):
            with suppress(OSError):
                status = os.stat(folder / name, follow_symlinks=False)
                if status.st_size == self.nbytes and abs(status.st_mtime - self.mtime) <= _MTIME_SECONDS:
                    return True
        return False


class OwnShards(ShardWriter):
    """The shards that this process has claimed; they are opened one by one.

    Parameters
    ----------
    run
        The run that the processes share; see `run_of`.
    """

    def __init__(self, place: Place, layout: Layout, run: str, *, direct: bool) -> None:
        super().__init__(place, layout, direct=direct)
        self._run = run

    def _partial(self, number: int) -> Path:
        return private(self._final(number), self._run)

    def begin(self, number: int) -> None:
        """Create the file of a shard at its full size, or go on with the space that a single process reserved for it.

        Raises
        ------
        WorldError
            If the disk is full.
        """
        shard, mine = self._shards[number], self._partial(number)
        make_folders(self._place.folder, shard.name)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        with world_errors(self._final(number)):
            with suppress(FileNotFoundError):
                os.replace(self._place.partial(shard.name), mine)
            descriptor = os.open(mine, flags, 0o666)
            try:
                if os.fstat(descriptor).st_size != shard.nbytes:
                    os.ftruncate(descriptor, 0)
                self.unreserved |= not allocate(descriptor, shard.nbytes)
                write_all(descriptor, shard.header, 0)
            except BaseException:
                os.close(descriptor)
                with suppress(OSError):
                    mine.unlink()
                raise
        self._take(number, descriptor)

    def end(self, number: int) -> Written:
        """Make a shard durable and close it."""
        mine = self._partial(number)
        with world_errors(self._final(number)):
            os.fsync(self._descriptors[number])
            self._close_one(number)
            fsync_directory(mine.parent)
            status = os.stat(mine)
        return Written(str(mine.relative_to(self._place.folder)), status.st_size, status.st_mtime)

    def look_at(self, number: int, is_sound: Callable[[], bool]) -> Written | None:
        """Return the file that a merge which worked alone has written of a shard; None if it is not sound.

        `is_sound` is called while `read` reads it.
        """
        shard = self._shards[number]
        for path in (self._place.partial(shard.name), self._final(number)):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                continue
            self._descriptors[number], self._direct_descriptors[number] = descriptor, None
            try:
                status = os.fstat(descriptor)
                if begins_as(descriptor, shard) and is_sound():
                    os.fsync(descriptor)
                    name = str(path.relative_to(self._place.folder))
                    return Written(name, status.st_size, status.st_mtime)
            finally:
                self._close_one(number)
        return None

    def drop(self, number: int) -> None:
        """Remove the file of a shard that somebody else has finished, or that this process will not finish."""
        if number in self._descriptors:
            self._close_one(number)
        with suppress(OSError):
            self._partial(number).unlink()

    def close(self) -> None:
        """Close all shards, and remove those that are not finished."""
        for number in list(self._descriptors):
            self.drop(number)


class Publisher:
    """Gives the files that the records name their final names; several processes may do so at once.

    Parameters
    ----------
    written
        The file of each shard.
    """

    def __init__(self, place: Place, layout: Layout, written: list[Written]) -> None:
        self._place, self._layout, self._written = place, layout, written

    def publish(self, shard: int) -> None:
        """Give a shard its final name; a name that it has already is durable afterwards."""
        final = self._place.path(self._layout.shards[shard].name)
        source = self._place.path(self._written[shard].name)
        with world_errors(final):
            if source != final:
                try:
                    os.replace(source, final)
                except FileNotFoundError:
                    os.stat(final)  # a different process was faster, or this one before it was killed
            fsync_directory(final.parent)
