"""Small files that several processes on several hosts share: what they need of a directory or of an object store.

`Folder` keeps them in a directory; `streammerge.output.object_volume` keeps them in a store.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from streammerge.io.durable import fsync_directory, world_errors, write_file, write_fully
from streammerge.io.private import is_private, private
from streammerge.output.place import RUN, WORKERS, is_run
from streammerge.output.same_kernel import kernel

_CLOCK_SECONDS = 30.0
"""Seconds after which the store is asked for its time again."""
_MAX_NBYTES = 1 << 30
"""Most bytes of one small file."""


class Gone(Exception):
    """The directory has been removed: what it was needed for has ended."""


class Volume(Protocol):
    """The working files of an output by name (``workers/x.json``). No call relies on a lock."""

    @property
    def domain(self) -> str:
        """The place where processes see each other without these files, such as by locks; it must be there."""

    def prepare(self, run: str) -> None:
        """Make room for signs of life and for the files of a run.

        Raises
        ------
        Gone
            If the directory has been removed.
        """

    def runs(self) -> list[str]:
        """Return the names of the runs that have files here."""

    def exists(self, name: str) -> bool:
        """Return whether there is a file of this name, or with the empty name anything at all."""

    def has_ended(self, domain: str, pid: int) -> bool:
        """Return whether a process that told this domain and number is known to have ended."""

    def leave(self, run: str) -> None:
        """Remove what `prepare` has made, if nothing is in it."""

    def discard(self, run: str) -> None:
        """Remove all files of a run, first what it is about: without it the run has ended."""

    def clear(self) -> None:
        """Remove all runs as `discard` does, and signs of life."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None if there is none."""

    def put(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """Write a file, whole or not at all; on return everyone sees it, and with `durable` it survives a loss of power.

        Raises
        ------
        Gone
            If the directory has been removed.
        """

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file; return False if it exists, as far as the store can tell: two processes may both succeed.

        Raises
        ------
        Gone
            If the directory has been removed.
        """

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the files in a folder, with the folder in front; empty if there is none."""

    def age(self, name: str) -> float | None:
        """Return the seconds since a file was written, by the store's clock alone; None if there is none."""

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""


class Folder:
    """A volume in a directory.

    Parameters
    ----------
    root
        The directory; the caller creates it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._asked: tuple[float, float] | None = None
        """The store's time and the monotonic clock's when it was asked."""

    @property
    def domain(self) -> str:
        """See `Volume`: the kernel and the mount, inside which file locks hold."""
        with world_errors(self.root):
            return f"{kernel()}:{os.stat(self.root).st_dev:x}"

    def prepare(self, run: str) -> None:
        """See `Volume`."""
        with world_errors(self.root), self._there():
            for folder in (self.root, self.root / WORKERS, self.root / run):
                folder.mkdir(exist_ok=True)
                fsync_directory(folder.parent)

    def runs(self) -> list[str]:
        """See `Volume`."""
        if self.root.is_symlink() or not self.root.is_dir():
            return []
        with world_errors(self.root):
            return sorted(filter(is_run, os.listdir(self.root)))

    def exists(self, name: str) -> bool:
        """See `Volume`."""
        return os.path.lexists(self.root / name)

    def has_ended(self, domain: str, pid: int) -> bool:
        """See `Volume`: its lock would tell."""
        return False

    def leave(self, run: str) -> None:
        """See `Volume`."""
        for folder in (self.root / run, self.root / WORKERS, self.root):
            with suppress(OSError):  # it is not empty, so it is not ours alone
                folder.rmdir()

    def discard(self, run: str) -> None:
        """See `Volume`."""
        with world_errors(self.root):
            remove_small(self.root / run)

    def clear(self) -> None:
        """See `Volume`."""
        for run in self.runs():
            self.discard(run)
        with world_errors(self.root):
            remove_small(self.root / WORKERS)
            if self.root.is_dir() and not self.root.is_symlink():
                self.root.rmdir()

    def read(self, name: str) -> bytes | None:
        """See `Volume`."""
        with world_errors(self.root / name):
            try:
                descriptor = os.open(self.root / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except (FileNotFoundError, NotADirectoryError):
                return None
            try:
                parts, size = [], 0
                while (data := os.read(descriptor, 1 << 20)) and size <= _MAX_NBYTES:
                    parts.append(data)
                    size += len(data)
                return b"".join(parts)
            except OSError as error:
                if error.errno == errno.ESTALE:  # NFS: it was replaced or removed while it was read
                    return None
                raise
            finally:
                os.close(descriptor)

    def put(self, name: str, data: bytes, *, durable: bool = True) -> None:
        """See `Volume`."""
        path = self.root / name
        with world_errors(path), self._there():
            if durable:
                write_file(path, data, private(path))
                fsync_directory(path.parent)
                return
            partial = private(path)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(partial, flags, 0o666)
            try:
                write_fully(descriptor, data)
            finally:
                os.close(descriptor)
            os.replace(partial, path)

    def create(self, name: str, data: bytes) -> bool:
        """See `Volume`."""
        path = self.root / name
        with world_errors(path), self._there():
            partial = private(path)
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(partial, flags | os.O_TRUNC, 0o666)
            try:
                write_fully(descriptor, data)
            finally:
                os.close(descriptor)
            try:
                os.link(partial, path)  # whole or not at all, also where O_EXCL is not
            except FileExistsError:
                return False
            except PermissionError:
                return self._create_where_nothing_links(path, data, flags)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK):
                    raise
                return self._create_where_nothing_links(path, data, flags)
            finally:
                os.unlink(partial)
            return True

    @staticmethod
    def _create_where_nothing_links(path: Path, data: bytes, flags: int) -> bool:
        try:
            descriptor = os.open(path, flags | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            write_fully(descriptor, data)
        finally:
            os.close(descriptor)
        return True

    def names(self, folder: str = "") -> list[str]:
        """See `Volume`."""
        place, prefix = self.root / folder, f"{folder}/" if folder else ""
        with world_errors(place):
            try:
                found = [entry.name for entry in os.scandir(place) if entry.is_file(follow_symlinks=False)]
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(prefix + name for name in found if not is_private(name))

    def age(self, name: str) -> float | None:
        """See `Volume`."""
        try:
            written = os.stat(self.root / name, follow_symlinks=False).st_mtime
        except OSError:
            return None
        return max(0.0, self._now() - written)

    def remove(self, name: str) -> None:
        """See `Volume`."""
        with world_errors(self.root / name), suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(self.root / name)

    def _now(self) -> float:
        """Return the time of the store, which is that of a file written just now."""
        now = time.monotonic()
        if self._asked is None or now - self._asked[1] > _CLOCK_SECONDS:
            probe = private(self.root / "clock")
            try:
                os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666))
                os.utime(probe)
                told = os.stat(probe).st_mtime
            except OSError:  # a reader who may not write: its own clock must do
                told = time.time()
            with suppress(OSError):
                os.unlink(probe)
            self._asked = told, now
        return self._asked[0] + now - self._asked[1]

    @contextmanager
    def _there(self) -> Iterator[None]:
        """Turn a missing file of our own into `Gone` if the directory is no longer there."""
        try:
            yield
        except FileNotFoundError:
            raise Gone(str(self.root)) from None


def remove_small(folder: Path) -> None:
    """Remove a directory of small files: signs of life of dead processes, or what several processes shared.

    What a run is about goes first: without it the run has ended.
    """
    if folder.is_dir() and not folder.is_symlink():
        for entry in sorted(os.listdir(folder), key=lambda name: name != RUN):
            (folder / entry).unlink(missing_ok=True)
        folder.rmdir()
