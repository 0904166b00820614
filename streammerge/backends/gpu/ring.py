"""Rings of pinned slots: all bytes between this process and a GPU pass through one, a few hundred MiB of memory.

Pinning costs half a second a GiB in small pages, so little memory is pinned, once, in huge pages. A slot is free again as
soon as its copy is done.
"""

from __future__ import annotations

import threading
from collections import deque

import numpy as np

from streammerge.backends.gpu.driver import Driver, DriverError, Event
from streammerge.io.buffer_pool import Bytes, map_memory

_WAIT_SECONDS = 0.2


class Ring:
    """Pinned slots of equal size, for copies in one direction. It may be used from many threads.

    Parameters
    ----------
    driver
        The driver that pins them.
    slots, slot_bytes
        Number of slots, and bytes of each: a multiple of a page.
    """

    def __init__(self, driver: Driver, slots: int, slot_bytes: int) -> None:
        self._driver = driver
        self.slot_bytes = slot_bytes
        self._memory = np.frombuffer(map_memory(slots * slot_bytes), dtype=np.uint8)
        self.pinned = True
        """Whether the driver took it; otherwise copies are slower, and wait."""
        self.refusal: object = None
        """Why it did not."""
        try:
            driver.pin(self._memory)
        except DriverError as error:
            self.pinned, self.refusal = False, error.why
        self._free: deque[tuple[int, Event | None]] = deque((i, None) for i in range(slots))
        self._changed = threading.Condition()

    def take(self, stop: threading.Event, *, wait: bool = True) -> tuple[int, Bytes] | None:
        """Return a free slot and its number; None if `stop` was set, or if none is free and `wait` is False.

        Whoever holds a slot must not wait for a second one: all slots might be held by those who wait.

        Raises
        ------
        DriverError
            If the copy that used it before failed.
        """
        with self._changed:
            while not self._free:
                if not wait or stop.is_set():
                    return None
                self._changed.wait(_WAIT_SECONDS)
            number, event = self._free.popleft()
        try:
            if event is not None:
                self._driver.synchronize(event)
        except BaseException:
            self.give(number)
            raise
        start = number * self.slot_bytes
        return number, self._memory[start : start + self.slot_bytes]

    def give(self, number: int, event: Event | None = None) -> None:
        """Return a slot, which is free once `event` has happened."""
        with self._changed:
            self._free.append((number, event))
            self._changed.notify()

    def close(self) -> None:
        """Wait for the copies, and unpin the slots, even if a copy failed: else their addresses stay registered."""
        try:
            while self._free:
                _, event = self._free.popleft()
                if event is not None:
                    self._driver.synchronize(event)
        finally:
            if self.pinned:
                self.pinned = False
                self._driver.unpin(self._memory)
