"""The memory of tensors on a device: one allocation, most of what is free, lent out in the order of requests."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from streammerge.backends.gpu.driver import Driver
from streammerge.errors import WorldError
from streammerge.units import format_size

SHARE = 0.6
"""Of the device's free memory; the rest is for kernels, for torch, and for the desktop."""
GRAIN = 256
"""Bytes; addresses are multiples of it."""
LEAST = 1 << 20
"""Bytes; with less a GPU is of no use."""
_SCRATCH = 8
"""One eighth is for tables and counts."""
_WAIT_SECONDS = 0.2


class Arena:
    """Device memory for tensors, and for scratch.

    Parameters
    ----------
    driver
        The device.
    tell
        Receives one line if there is less than wanted.
    """

    def __init__(self, driver: Driver, tell: Callable[[str], None]) -> None:
        self._driver = driver
        wanted = size = int(driver.memory() * SHARE) // GRAIN * GRAIN
        while True:
            try:
                self._base = driver.allocate(size) if size >= LEAST else 0
                break
            except MemoryError:
                size = size // 2 // GRAIN * GRAIN
        if not self._base:
            raise WorldError(
                f"the GPU has only {format_size(wanted)} to spare: end what else uses it, or merge with --device cpu"
            )
        self.scratch = Space(self._base, size // _SCRATCH)
        self._space = Space(self._base + self.scratch.nbytes, size - self.scratch.nbytes)
        self.limit = self._space.nbytes
        """Most bytes of a tensor that is held whole."""
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()
        if size < wanted:
            tell(
                f"the GPU ran out of memory: tensors of more than {format_size(self.limit)} are streamed through it, which "
                "reads them more than once"
            )

    @contextmanager
    def lease(self, nbytes: int, stop: threading.Event) -> Iterator[int | None]:
        """Lend device memory of at least `nbytes`, at most `limit`; None if `stop` was set while waiting."""
        assert nbytes <= self._space.nbytes, (nbytes, self._space.nbytes)
        address = self._acquire(nbytes, stop)
        try:
            yield address
        finally:
            if address is not None:
                with self._changed:
                    self._space.free(address)
                    self._changed.notify_all()

    def _acquire(self, nbytes: int, stop: threading.Event) -> int | None:
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                while not stop.is_set():
                    if self._queue[0] is ticket:
                        try:
                            return self._space.allocate(nbytes)
                        except MemoryError:
                            pass  # until others give theirs back
                    self._changed.wait(_WAIT_SECONDS)
                return None
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()

    def close(self) -> None:
        """Give the memory back; nobody uses it any more."""
        self._driver.free(self._base)


class Space:
    """A range of addresses, given out by first fit."""

    def __init__(self, base: int, nbytes: int) -> None:
        self.base = -(-base // GRAIN) * GRAIN
        self.nbytes = (base + nbytes - self.base) // GRAIN * GRAIN
        self._used: dict[int, int] = {}
        """Bytes by address, in the order of addresses."""

    def allocate(self, nbytes: int) -> int:
        """Return the address of `nbytes` bytes.

        Raises
        ------
        MemoryError
            If no gap is large enough.
        """
        size, position = max(1, -(-nbytes // GRAIN)) * GRAIN, self.base
        for address, used in self._used.items():
            if address - position >= size:
                break
            position = address + used
        if position + size > self.base + self.nbytes:
            raise MemoryError
        self._used = dict(sorted([*self._used.items(), (position, size)]))
        return position

    def free(self, address: int) -> None:
        """Give bytes back."""
        del self._used[address]
