"""How far a run is: what it tells, and where it stops when it is asked to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from streammerge.engine.merge import Event
from streammerge.errors import Stopped
from streammerge.io.reader import Reader

_EVENT_SECONDS = 0.2


class Progress:
    """Counts the work, tells of it, and stops it when asked to."""

    def __init__(
        self,
        reader: Reader,
        n_tensors: int,
        emit: Callable[[Event], None],
        stop: threading.Event,
        signal_received: Callable[[], int | None],
    ) -> None:
        self._reader = reader
        self._emit = emit
        self._stop = stop
        self._signal = signal_received
        self._values = {"tensors": 0, "tensors_total": n_tensors, "bytes_written": 0}
        self._next = 0.0
        self.done = 0
        self.total = 0

    def tick(self, work: int) -> None:
        """Count work; raise if the estimate is to stop."""
        if self._stop.is_set():
            raise Stopped(self._signal() or 15)
        self.done += work
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EVENT_SECONDS
        self._emit(
            Event(
                "progress",
                {
                    **self._values,
                    "elements": self.done,
                    "elements_total": self.total,
                    "bytes_read": self._reader.bytes_read,
                },
            )
        )

    def wrote(self, nbytes: int) -> None:
        """Count a tensor of the store."""
        self._values["tensors"] += 1
        self._values["bytes_written"] += nbytes
