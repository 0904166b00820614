"""The progress and speed of a run, from its events, for every kind of report."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

_WINDOW_SECONDS = 30.0
"""Seconds over which the speed is averaged, so that it does not flicker."""
_LEAST_SECONDS = 1.0
"""Seconds before a speed is given."""


class Pace:
    """The speed of a growing number over the last half minute.

    Parameters
    ----------
    clock
        Function that returns seconds; tests replace it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, float]] = deque()

    def add(self, value: float) -> None:
        """Record the current number."""
        now = self._clock()
        self._samples.append((now, value))
        while len(self._samples) > 2 and now - self._samples[1][0] >= _WINDOW_SECONDS:
            self._samples.popleft()

    @property
    def per_second(self) -> float | None:
        """The speed; None at the beginning."""
        if len(self._samples) < 2:
            return None
        (began, first), (ended, last) = self._samples[0], self._samples[-1]
        return (last - first) / (ended - began) if ended - began >= _LEAST_SECONDS else None


class Tracker:
    """Follows the events of a run.

    The work of a merge is counted in bytes read and written: first the whole-model passes, then the bytes of finished
    elements. A resumed merge does not repeat the passes of an earlier run.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.plan: Mapping[str, Any] = {}
        """The values of the event ``plan``; empty if the run is not a merge."""
        self.values: Mapping[str, Any] = {}
        """The values of the last ``progress``."""
        self.done = 0.0
        """Work done, including earlier runs, in the unit of `total`."""
        self.total: float | None = None
        """The whole work; None until it is known."""
        self._resumed = False
        self._first_elements: int | None = None
        self._bytes, self._work = Pace(clock), Pace(clock)

    def __call__(self, kind: str, values: Mapping[str, Any]) -> None:
        """Process an event."""
        if kind == "plan":
            self.plan = values
        elif kind in ("start", "resume"):
            self._start(values["bytes_done"])
        elif kind in ("progress", "import"):
            self._progress(values)

    def _start(self, bytes_done: int) -> None:
        """Start measuring; earlier work, such as compiling and an earlier run, does not count."""
        self._bytes, self._work = Pace(self._clock), Pace(self._clock)
        self._bytes.add(0)
        if not self.plan:
            return
        merging = self._merging_bytes()
        self._resumed = bytes_done > 0
        self.total = float(self.plan["bytes_to_read"] + self.plan["bytes_to_write"])
        self.done = merging * bytes_done / max(1, self.plan["bytes_to_write"])
        self.done += self.plan["bytes_of_passes"] if self._resumed else 0
        self._work.add(self.done)

    def _progress(self, values: Mapping[str, Any]) -> None:
        self.values = values
        elements, most = (
            ("elements", "elements_total") if "elements" in values else ("tensors", "tensors_total")
        )
        if self._first_elements is None:
            self._first_elements = values[elements]
        share = values[elements] / max(1, values[most])
        if self.plan:
            passes = self.plan["bytes_of_passes"]
            if not self._resumed and values[elements] == self._first_elements:
                passes = min(passes, values["bytes_read"])
            self.done = max(self.done, passes + self._merging_bytes() * share)
        else:
            self.done, self.total = float(values[elements]), float(values[most])
        self._bytes.add(values["bytes_read"] + values.get("bytes_written", 0))
        self._work.add(self.done)

    def _merging_bytes(self) -> float:
        return float(self.plan["bytes_to_read"] + self.plan["bytes_to_write"] - self.plan["bytes_of_passes"])

    @property
    def fraction(self) -> float | None:
        """The fraction of the work that is done; None until the whole is known."""
        return min(1.0, self.done / self.total) if self.total else None

    @property
    def bytes_per_second(self) -> float | None:
        """Recent speed in bytes read and written per second; None at the beginning."""
        return self._bytes.per_second

    @property
    def seconds_left(self) -> float | None:
        """Estimated remaining seconds at the pace of this run; None at the beginning."""
        pace = self._work.per_second
        return max(0.0, self.total - self.done) / pace if self.total and pace else None
