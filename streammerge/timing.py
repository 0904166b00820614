"""A stopwatch per stage of a run: seconds of wall clock and of CPU, summed over all threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Stage = Literal[
    "start",
    "wait for memory",
    "read",
    "decompress",
    "wait for the GPU",
    "statistics",
    "compute",
    "checksum",
    "write",
    "sync",
    "commit",
]
"""``start``, ``sync`` and ``commit`` run beside the workers or while there are none; the others in workers."""

BESIDE: tuple[Stage, ...] = ("start", "sync", "commit")


class Stages:
    """A stopwatch per stage; may be used from many threads at once. Stages do not nest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: dict[Stage, list[float]] = {}

    @contextmanager
    def time(self, stage: Stage) -> Iterator[None]:
        """Add the time of the block in this thread to a stage."""
        began, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - began, time.thread_time() - cpu)

    def add(self, stage: Stage, seconds: float, cpu: float) -> None:
        """Add seconds of wall clock and of CPU to a stage."""
        with self._lock:
            total = self._seconds.setdefault(stage, [0.0, 0.0])
            total[0] += seconds
            total[1] += cpu

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Return the seconds of each stage: ``wall``, and ``cpu`` while it was running."""
        with self._lock:
            return {
                stage: {"wall": round(wall, 3), "cpu": round(cpu, 3)}
                for stage, (wall, cpu) in self._seconds.items()
            }
