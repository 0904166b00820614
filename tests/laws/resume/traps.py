"""Failures at the n-th call of an operation."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streammerge.errors import WorldError
from streammerge.io import allocate, durable
from streammerge.output import commit, journal
from streammerge.output import directory as output
from streammerge.output import shards as writer
from streammerge.output.place import JOURNAL as NAME
from streammerge.output.place import STATE
from streammerge.output.shards import ShardWriter
from tests.laws.resume.scene import Scene


class Trap:
    """Counts calls and fails from the `at`-th on, or at it alone."""

    def __init__(self, error: BaseException, at: int, *, once: bool) -> None:
        self.error, self.at, self.once = error, at, once
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self.calls += 1
            if self.calls == self.at or (self.calls > self.at and not self.once):
                raise self.error

    @property
    def sprung(self) -> bool:
        return self.calls >= self.at


def guarded(function: Callable[..., Any], trap: Trap) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        if isinstance(trap.error, OSError) and function is not durable.fsync_directory:
            with durable.world_errors("a file"):
                trap()
        else:
            trap()
        return function(*arguments, **options)

    return call


def cannot_allocate(*arguments: Any) -> None:
    """Stand for a file system that cannot set space aside."""
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def set_trap(monkeypatch: pytest.MonkeyPatch, operation: str, trap: Trap) -> None:
    owner: Any
    if operation.startswith("os."):
        name = operation.removeprefix("os.")
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            trap()
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, call)
        if name == "ftruncate":
            monkeypatch.setattr(allocate, "fallocate", cannot_allocate)
    elif operation == "fallocate":
        monkeypatch.setattr(allocate, operation, guarded(allocate.fallocate, trap))
    elif operation.startswith(("ShardWriter.", "Journal.")):
        kind, name = operation.split(".")
        owner = ShardWriter if kind == "ShardWriter" else journal.Journal
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name), trap))
    else:
        function = guarded(getattr(durable, operation), trap)
        for module in (durable, writer, journal, output, commit):
            if hasattr(module, operation):
                monkeypatch.setattr(module, operation, function)


def interrupt(scene: Scene, out: Path, monkeypatch: pytest.MonkeyPatch, *, after: int = 4) -> None:
    """Leave an unfinished merge in `out`, some of it done and recorded."""
    with monkeypatch.context() as patch:
        set_trap(patch, "ShardWriter.write", Trap(OSError(errno.ENOSPC, "full"), after, once=False))
        with pytest.raises(WorldError, match="run the same command again"):
            scene.merge(out)
    assert (out / STATE / NAME).exists()
