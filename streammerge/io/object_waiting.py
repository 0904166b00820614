"""Patience with a store that is away: it is asked again after longer and longer pauses, for some minutes.

The user is told once what is waited for, and can stop the wait.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from streammerge.errors import StreammergeWarning
from streammerge.io.object_errors import AGAIN, explained, is_passing, seconds_spent

PATIENCE = 180.0
"""Seconds for which a request is repeated while nothing comes."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0
_LOOK_SECONDS = 0.2
"""Seconds between two looks at whether the wait is to end."""
_END_SECONDS = 60.0
"""Seconds after a wait in vain in which nothing more is waited for: what a command tidies up as it ends."""

Tell = Callable[[str], None]


def _warn(line: str) -> None:
    warnings.warn(line, StreammergeWarning, stacklevel=2)


def _go_on() -> None:
    """Wait on."""


class _Listener(threading.local):
    """Who is told of waits, and may end them; a different one in each thread that has set one."""

    tell: Tell = staticmethod(_warn)
    check: Callable[[], None] = staticmethod(_go_on)


_LISTENER = _Listener()
_TOLD: dict[str, float] = {}
"""When a wait for a bucket was told last, by the monotonic clock: the next ones belong to it."""
_IN_VAIN: dict[str, float] = {}
"""When a wait for a bucket ended in vain, by the monotonic clock; forgotten when something comes from there."""


def listen(tell: Tell, check: Callable[[], None]) -> None:
    """From now on tell the waits of this thread to `tell`, and end one when `check` raises an exception."""
    _LISTENER.tell, _LISTENER.check = tell, check


@contextmanager
def listening(tell: Tell, check: Callable[[], None]) -> Iterator[None]:
    """Do as `listen` inside a ``with`` block."""
    before = _LISTENER.tell, _LISTENER.check
    listen(tell, check)
    try:
        yield
    finally:
        listen(*before)


class Patience:
    """The repetition of one request.

    Parameters
    ----------
    url
        What is asked for.
    stop
        Set to wait no longer; None: the listener of the thread is told of the wait, and may end it.
    tell
        Told of the wait in place of the listener, from this thread; with `stop`, nobody is without it.
    """

    def __init__(self, url: str, stop: threading.Event | None = None, tell: Tell | None = None) -> None:
        self._url, self._stop, self._told_to = url, stop, tell
        self._bucket = "/".join(url.split("/")[:3])
        self._pause = _FIRST_PAUSE
        self._failed: float | None = None
        """The time of the first failure since something came."""

    def came(self) -> None:
        """Note that something came."""
        self._failed, self._pause = None, _FIRST_PAUSE
        _IN_VAIN.pop(self._bucket, None)

    def wait(self, error: Exception) -> bool:
        """Wait after a failure; return whether to ask again.

        Raises
        ------
        Stopped
            If the listener ends the wait.
        """
        now = time.monotonic()
        self._failed = now - seconds_spent(error) if self._failed is None else self._failed
        if not is_passing(error):
            _IN_VAIN.pop(self._bucket, None)  # an answer
            return False
        if now - self._failed >= PATIENCE:
            _IN_VAIN[self._bucket] = now
            return False
        if now - _IN_VAIN.get(self._bucket, -_END_SECONDS) < _END_SECONDS:
            return False
        pause, self._pause = self._pause, min(2 * self._pause, _LONGEST_PAUSE)
        if self._stop is None or self._told_to is not None:
            self._tell(error)
        if self._stop is not None:
            return not self._stop.wait(pause)
        until = time.monotonic() + pause
        while (left := until - time.monotonic()) > 0:
            _LISTENER.check()
            time.sleep(min(left, _LOOK_SECONDS))
        _LISTENER.check()
        return True

    def _tell(self, error: Exception) -> None:
        now = time.monotonic()
        if now - _TOLD.get(self._bucket, -PATIENCE) >= PATIENCE:
            _TOLD[self._bucket] = now
            why = str(explained(self._url, error)).removesuffix(AGAIN).rstrip("; :")
            (self._told_to or _LISTENER.tell)(
                f"{why}; it is asked again for {PATIENCE / 60:.0f} minutes at most"
            )
