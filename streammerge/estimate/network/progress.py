"""The progress of an estimate: events, and the points where it can be stopped."""

from __future__ import annotations

import time

from streammerge.events import Control, Event
from streammerge.io.reader import Reader

_EVENT_SECONDS = 0.2


class Progress:
    """Counts and reports the work, and stops the estimate on request."""

    def __init__(
        self,
        reader: Reader,
        n_tensors: int,
        control: Control,
    ) -> None:
        self._reader = reader
        self._control = control
        self._values = {"tensors": 0, "tensors_total": n_tensors, "bytes_written": 0}
        self._next = 0.0
        self.done = 0
        self.total = 0

    def tick(self, work: int) -> None:
        """Count work; raise `Stopped` if a stop is requested."""
        self._control.check()
        self.done += work
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EVENT_SECONDS
        self._control.emit(
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
        """Count a written tensor of the store."""
        self._values["tensors"] += 1
        self._values["bytes_written"] += nbytes
