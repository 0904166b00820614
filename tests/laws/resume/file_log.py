"""A log of all that a program does to files under a directory, taken from the calls of the operating system."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from streammerge.io import allocate
from tests.laws.resume.scene import SimulatedKill

Tree = dict[str, bytes | None]
"""Content by path under the root; None for a directory."""


ROOT = 0


@dataclass(frozen=True)
class Resize:
    """A file gets a length; what is new is zero."""

    file: int
    nbytes: int
    grow_only: bool


@dataclass(frozen=True)
class Write:
    """Bytes are put into a file."""

    file: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Link:
    """A new file or directory gets its name."""

    directory: int
    name: str
    target: int
    is_directory: bool = False


@dataclass(frozen=True)
class Move:
    """A file gets another name in its directory."""

    directory: int
    name: str
    new_name: str
    target: int


@dataclass(frozen=True)
class Unlink:
    """A name is taken away."""

    directory: int
    name: str
    target: int


@dataclass(frozen=True)
class Sync:
    """All earlier changes of a file, or of the names in a directory, are durable; or, if it failed, never will be."""

    target: int
    good: bool = True


Data = Resize | Write


Name = Link | Move | Unlink


Op = Data | Name | Sync


def changed(op: Data | Name) -> int:
    """Return the file or directory that an operation changes."""
    return op.file if isinstance(op, Resize | Write) else op.directory


# --- recording


@dataclass
class Recorder:
    """Records, in order, what is done under a root; kills or fails where it is told to.

    Parameters
    ----------
    root
        A directory; what it holds already is taken as durable.
    pause
        Seconds to sleep after each write, so that a small merge syncs more than once.
    """

    root: Path
    pause: float = 0.0
    log: list[Op] = field(default_factory=list)
    kill_at: int | None = None
    """The operation from which on nothing is done any more."""
    fail_sync: int | None = None
    """The number of the sync that fails, counted from 0 over all runs."""

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._names: dict[int, dict[str, int]] = {ROOT: {}}
        self._directories = {ROOT}
        self._descriptors: dict[int, int] = {}
        self._last = ROOT
        self.syncs = 0
        self._adopt(self.root, ROOT)
        self.begin = len(self.log)

    def _adopt(self, place: Path, directory: int) -> None:
        for entry in sorted(place.iterdir()):
            number = self._new(directory, entry.name, entry.is_dir())
            if entry.is_dir():
                self._adopt(entry, number)
            else:
                self.log.append(Write(number, 0, entry.read_bytes()))
                self.log.append(Sync(number))
        self.log.append(Sync(directory))

    def _new(self, directory: int, name: str, is_directory: bool) -> int:
        self._last += 1
        self._names[directory][name] = self._last
        if is_directory:
            self._names[self._last] = {}
            self._directories.add(self._last)
        self.log.append(Link(directory, name, self._last, is_directory))
        return self._last

    def _place(self, path: Any) -> tuple[int, str] | None:
        """Return directory and name of a path under the root; None for one that is elsewhere."""
        whole = os.path.abspath(os.fsdecode(path))
        if os.path.commonpath([whole, self.root]) != str(self.root) or whole == str(self.root):
            return None
        parts = Path(whole).relative_to(self.root).parts
        directory = ROOT
        for part in parts[:-1]:
            if part not in self._names[directory]:
                return None
            directory = self._names[directory][part]
        return directory, parts[-1]

    def _find(self, path: Any) -> int | None:
        text = os.fsdecode(path)
        if text.startswith("/proc/self/fd/"):
            return self._descriptors.get(int(text.rpartition("/")[2]))
        if os.path.abspath(text) == str(self.root):
            return ROOT
        place = self._place(text)
        return None if place is None else self._names[place[0]].get(place[1])

    def _next(self) -> None:
        if self.kill_at is not None and len(self.log) >= self.kill_at:
            raise SimulatedKill

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stand in for the functions of `os` that change the file system."""
        wrappers: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
            "open": self._open,
            "close": self._close,
            "pwrite": self._pwrite,
            "write": self._write,
            "ftruncate": self._ftruncate,
            "fsync": self._sync,
            "fdatasync": self._sync,
            "replace": self._rename,
            "rename": self._rename,
            "unlink": self._unlink,
            "rmdir": self._unlink,
            "mkdir": self._mkdir,
        }
        for name, wrapper in wrappers.items():
            monkeypatch.setattr(os, name, wrapper(getattr(os, name)))
        monkeypatch.setattr(allocate, "fallocate", self._fallocate(allocate.fallocate))

    def _open(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            with self._lock:
                place = self._place(path) if isinstance(path, str | os.PathLike) else None
                known = self._find(path)
                creates = place is not None and known is None and bool(flags & os.O_CREAT)
                cuts = known is not None and bool(flags & os.O_TRUNC)
                if creates or cuts:
                    self._next()
                descriptor = real(path, flags, *rest, **options)
                if creates:
                    assert place is not None
                    known = self._new(*place, False)
                if cuts:
                    assert known is not None
                    self.log.append(Resize(known, 0, False))
                if known is not None:
                    self._descriptors[descriptor] = known
                return descriptor

        return call

    def _close(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            with self._lock:
                self._descriptors.pop(descriptor, None)
                real(descriptor)

        return call

    def _changing(self, descriptor: int, real: Callable[[], Any], op: Callable[[int, Any], Op]) -> Any:
        with self._lock:
            known = self._descriptors.get(descriptor)
            if known is not None:
                self._next()
            result = real()
            if known is not None:
                self.log.append(op(known, result))
        if known is not None and self.pause:
            time.sleep(self.pause)
        return result

    def _pwrite(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(descriptor: int, data: Any, offset: int) -> int:
            content = bytes(data)
            return self._changing(
                descriptor,
                lambda: real(descriptor, data, offset),
                lambda file, n: Write(file, offset, content[:n]),
            )

        return call

    def _write(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(descriptor: int, data: Any) -> int:
            if descriptor not in self._descriptors:
                return real(descriptor, data)
            content = bytes(data)
            end = os.lseek(descriptor, 0, os.SEEK_END)  # we only ever append
            return self._changing(
                descriptor, lambda: real(descriptor, data), lambda file, n: Write(file, end, content[:n])
            )

        return call

    def _fallocate(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(descriptor: int, nbytes: int) -> None:
            self._changing(
                descriptor,
                lambda: real(descriptor, nbytes),
                lambda file, _: Resize(file, nbytes, True),
            )

        return call

    def _ftruncate(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(descriptor: int, nbytes: int) -> None:
            self._changing(
                descriptor, lambda: real(descriptor, nbytes), lambda file, _: Resize(file, nbytes, False)
            )

        return call

    def _sync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            with self._lock:
                known = self._descriptors.get(descriptor)
                if known is None:
                    return real(descriptor)
                self._next()
                number, self.syncs = self.syncs, self.syncs + 1
                self.log.append(Sync(known, number != self.fail_sync))
                if number == self.fail_sync:
                    raise OSError(errno.EIO, "Input/output error")
                return real(descriptor)

        return call

    def _rename(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any, **options: Any) -> None:
            with self._lock:
                here, there = self._place(source), self._place(target)
                if here is None or there is None:
                    real(source, target, **options)
                    return
                self._next()
                real(source, target, **options)
                file = self._names[here[0]].pop(here[1])
                self._names[there[0]][there[1]] = file
                if here[0] == there[0]:
                    self.log.append(Move(here[0], here[1], there[1], file))
                else:  # each directory has its own sync
                    self.log += [Link(there[0], there[1], file), Unlink(here[0], here[1], file)]

        return call

    def _unlink(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, **options: Any) -> None:
            with self._lock:
                place = self._place(path)
                if place is None or place[1] not in self._names[place[0]]:
                    real(path, **options)
                    return
                self._next()
                real(path, **options)
                self.log.append(Unlink(*place, self._names[place[0]].pop(place[1])))

        return call

    def _mkdir(self, real: Callable[..., None]) -> Callable[..., None]:
        def call(path: Any, *rest: Any, **options: Any) -> None:
            with self._lock:
                place = self._place(path)
                if place is None:
                    real(path, *rest, **options)
                    return
                if place[1] not in self._names[place[0]]:
                    self._next()
                real(path, *rest, **options)
                self._new(*place, True)

        return call
