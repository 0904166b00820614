"""Events of a run, and the caller's means to stop it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from typing import Any

from streammerge.errors import Stopped
from streammerge.records import dataclass


@dataclass(frozen=True)
class Event:
    """Something that a caller may want to show."""

    kind: str
    """``plan``, ``compiling``, ``compiled``, ``hash``, ``start``, ``resume``, ``progress``, ``import``, ``warning``, ``commit``, ``verify`` or ``done``."""
    values: Mapping[str, Any] = field(default_factory=dict)


def warning(message: str) -> Event:
    """Return the event of something a user should know."""
    return Event("warning", {"message": message})


def _ignore(event: Event) -> None:
    """Show nothing."""


def _no_signal() -> int | None:
    return None


_LOOK_SECONDS = 0.05
"""Seconds between looks at the event of the whole."""


class _StopOfPart(threading.Event):
    """Is set with the event of the whole, and by itself."""

    def __init__(self, whole: threading.Event) -> None:
        super().__init__()
        self._whole = whole

    def is_set(self) -> bool:
        return super().is_set() or self._whole.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        end = None if timeout is None else time.monotonic() + timeout
        while not self.is_set() and (end is None or time.monotonic() < end):
            left = _LOOK_SECONDS if end is None else min(_LOOK_SECONDS, end - time.monotonic())
            super().wait(max(0.0, left))
        return self.is_set()


@dataclass(frozen=True)
class Control:
    """The caller's side of a run: it receives events, and may stop the run from a different thread."""

    emit: Callable[[Event], None] = _ignore
    """Called with every event, from the thread that runs."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set it to stop cleanly after the running work."""
    signal: Callable[[], int | None] = _no_signal
    """Function that returns the number of the signal that set `stop`, or None."""

    def part(self, emit: Callable[[Event], None]) -> Control:
        """Return the control of a part of the run, which may end alone: to set its `stop` does not stop the whole."""
        return replace(self, emit=emit, stop=_StopOfPart(self.stop))

    def warn(self, message: str) -> None:
        """Emit a warning."""
        self.emit(warning(message))

    def check(self) -> None:
        """Raise `Stopped` once `stop` is set."""
        if self.stop.is_set():
            raise Stopped(self.signal() or signal.SIGTERM)
