"""Turns: several threads do something in a given order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_WAIT_SECONDS = 0.2


class Turns:
    """Lets numbered threads pass one after the other.

    Chunks lease their buffers in order. If later chunks could overtake, they might hold all buffers while they wait to
    write after a chunk that gets none.

    Parameters
    ----------
    stop
        Set to let everyone pass, because the merge ends.
    """

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._next = 0
        self._changed = threading.Condition()

    @contextmanager
    def of(self, number: int) -> Iterator[None]:
        """Wait for the turn of `number`; the next comes when the block ends."""
        with self._changed:
            while self._next != number and not self._stop.is_set():
                self._changed.wait(_WAIT_SECONDS)
        try:
            yield
        finally:
            with self._changed:
                self._next = max(self._next, number + 1)
                self._changed.notify_all()
