"""A pool of reusable buffers whose total size never exceeds the capacity.

Each buffer is an anonymous mapping, so freeing it returns the memory at once, which a heap does not guarantee. Leases are
granted in the order of requests, so large chunks do not starve.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_GRAIN = 1 << 16


class Pool:
    """Leases byte buffers within a capacity.

    Parameters
    ----------
    capacity
        Most bytes of all buffers, leased and idle.
    prepare, dismiss
        Called with every buffer after it is created, and before it is freed.
    """

    def __init__(
        self,
        capacity: int,
        prepare: Callable[[Bytes], None] | None = None,
        dismiss: Callable[[Bytes], None] | None = None,
    ) -> None:
        self._capacity = capacity
        self._prepare = prepare
        self._dismiss = dismiss
        self._idle: list[Bytes] = []
        self._held = 0
        self._lock = threading.Lock()
        self._queue: deque[threading.Condition] = deque()
        """Who waits, in order; only the first is woken, since all others would wait on."""

    @contextmanager
    def lease(self, nbytes: int, stop: threading.Event) -> Iterator[Bytes | None]:
        """Lend a buffer of at least `nbytes`; None if `stop` was set while waiting."""
        size = max(1, -(-nbytes // _GRAIN)) * _GRAIN
        assert size <= self._capacity + _GRAIN, (nbytes, self._capacity)
        buffer = self._acquire(size, stop)
        try:
            yield buffer
        finally:
            if buffer is not None:
                with self._lock:
                    self._idle.append(buffer)
                    self._wake_first()

    def _acquire(self, size: int, stop: threading.Event) -> Bytes | None:
        turn = threading.Condition(self._lock)
        with turn:
            self._queue.append(turn)
            try:
                while not stop.is_set():
                    if self._queue[0] is turn and (buffer := self._take(size)) is not None:
                        return buffer
                    turn.wait(timeout=0.2)
                return None
            finally:
                self._queue.remove(turn)
                self._wake_first()

    def _wake_first(self) -> None:
        if self._queue:
            self._queue[0].notify()

    def _take(self, size: int) -> Bytes | None:
        # A larger buffer is accepted: fresh pages (faults, zeroing) cost more than the wasted space.
        fitting = [buffer for buffer in self._idle if size <= buffer.size]
        if fitting:
            best = min(fitting, key=lambda buffer: buffer.size)
            self._idle = [buffer for buffer in self._idle if buffer is not best]
            return best
        limit = max(self._capacity, size)
        while self._held + size > limit and self._idle:
            self._give_up(self._idle.pop(0))
        if self._held + size > limit:
            return None
        buffer = np.frombuffer(map_memory(size), dtype=np.uint8)
        if self._prepare is not None:
            self._prepare(buffer)
        self._held += size
        return buffer

    def _give_up(self, buffer: Bytes) -> None:
        self._held -= buffer.size
        if self._dismiss is not None:
            self._dismiss(buffer)

    def close(self) -> None:
        """Free all idle buffers."""
        with self._lock:
            while self._idle:
                self._give_up(self._idle.pop())


def map_memory(size: int) -> mmap.mmap:
    """Map fresh memory, in huge pages if possible, which need far fewer faults and pins for I/O."""
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped
