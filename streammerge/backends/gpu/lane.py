"""A GPU as the engine uses it: bytes go in through a ring, are computed where they lie, and come out through a ring.

::

    readers ──> ring in ──> stream of copies in ──> arena ──> stream of kernels ──> stream of copies out ──> ring out ──> writers

Three streams run at the same time, and events order them: a kernel waits for the copies of its own tensor, a copy out for
the kernels that made it. A slot is used again when its copy is done, a place in the arena when its output has been written.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np

from streammerge.algebra.block import Block, BlockMath
from streammerge.backends.fused.decoding import enqueue_decoding
from streammerge.backends.fused.launcher import Launcher, Residence
from streammerge.backends.gpu.arena import Arena
from streammerge.backends.gpu.driver import Driver, DriverError, Event
from streammerge.backends.gpu.launcher import DriverLauncher
from streammerge.backends.gpu.residence import InArena
from streammerge.backends.gpu.ring import Ring
from streammerge.io.buffer_pool import Bytes
from streammerge.io.pages import PAGE
from streammerge.records import dataclass
from streammerge.units import format_size

MathOf = Callable[[Block, Launcher, Residence], BlockMath]
"""Makes the arithmetic of a block that lies on the device."""
_AHEAD = 4
"""Copies out of a tensor that are under way while one is written."""


@dataclass(frozen=True)
class Sizes:
    """The pinned memory of a lane."""

    slots_in: int = 32
    slots_out: int = 16
    slot_bytes: int = 8 << 20
    """Copies of 2 MiB and more reach a bus's full speed."""
    staging: int = 4
    staging_bytes: int = 1 << 20
    """Slots for tables and counts, and bytes of each."""

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return (self.slots_in + self.slots_out) * self.slot_bytes + self.staging * self.staging_bytes


USUAL = Sizes()


class Lane:
    """One GPU for the threads of one process.

    Parameters
    ----------
    driver
        The device; it is closed with the lane.
    math
        Makes the arithmetic of blocks.
    ptx
        Returns the PTX of a kernel.
    sizes
        The pinned memory.
    """

    def __init__(self, driver: Driver, math: MathOf, ptx: Callable[..., str], sizes: Sizes = USUAL) -> None:
        self.remarks: list[str] = []
        """Lines that the user is told once."""
        self._driver, self._math, self._turn = driver, math, threading.Lock()
        self._opened = ExitStack()
        self._opened.callback(driver.close)
        try:
            self._in = self._ring(sizes.slots_in, sizes.slot_bytes)
            self._out = self._ring(sizes.slots_out, sizes.slot_bytes)
            staging = self._ring(sizes.staging, sizes.staging_bytes)
            self.arena = Arena(driver, self.remarks.append)
            self._opened.callback(self.arena.close)
            self._copies_in, self._kernels, self._copies_out = (driver.stream() for _ in range(3))
        except BaseException:
            self._opened.close()
            raise
        self._launcher = DriverLauncher(driver, self._kernels, self.arena.scratch, staging, ptx)
        if not self._in.pinned or not self._out.pinned:
            # The driver locks pages itself, and no limit of the process (`ulimit -l`) bounds it.
            self.remarks.append(
                f"the GPU's driver does not pin {format_size(sizes.nbytes)} of memory "
                f"({self._in.refusal or self._out.refusal}), so that copies are slower: leave more of the machine's memory "
                "free; WSL and some virtual machines let little be pinned"
            )

    def _ring(self, slots: int, slot_bytes: int) -> Ring:
        ring = Ring(self._driver, slots, slot_bytes)
        self._opened.callback(ring.close)
        return ring

    @property
    def read_bytes(self) -> int:
        """Most bytes that are read at a time: a slot has room for the pages at both ends."""
        return self._in.slot_bytes - PAGE

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot that codes are read into."""
        return self._in.slot_bytes

    def bring(
        self, read: Callable[[Bytes], Iterable[tuple[int, Bytes]]], stop: threading.Event
    ) -> Event | None:
        """Have a slot filled, and enqueue its copies to the device.

        Parameters
        ----------
        read
            Fills a slot, and returns the parts of it that are copied, each with its address on the device.

        Returns the event of the copies' end; None if `stop` was set before there was a slot.
        """
        taken = self._in.take(stop)
        if taken is None:
            return None
        number, slot = taken
        event = None
        copied = False
        try:
            for address, part in read(slot):
                copied = True
                self._driver.copy_in(part, address, self._copies_in)
            event = self._driver.record(self._copies_in)
        finally:
            if event is None and copied:
                self.settle()  # since the slot is filled again
            self._in.give(number, event)
        return event

    @contextmanager
    def computing(self, brought: Event) -> Iterator[None]:
        """Let one thread at a time compute, after the copies up to an event."""
        with self._turn:
            self._driver.wait(self._kernels, brought)
            yield

    def math(self, block: Block, address: int) -> BlockMath:
        """Return the arithmetic of a block whose operands lie at their offsets from `address`."""
        return self._math(block, self._launcher, InArena(block, address, self._launcher))

    def decode(self, codes: Sequence[tuple[Any, Sequence[int], int]]) -> Event:
        """Enqueue the decoding of codes on the device, within this thread's turn; return the event of its end.

        Parameters
        ----------
        codes
            For each, what `enqueue_decoding` takes: how, the addresses of its arrays, and where its values go.
        """
        for decoding, arrays, out in codes:
            enqueue_decoding(self._launcher, decoding, arrays, out)
        return self._driver.record(self._kernels)

    def wait(self, event: Event) -> None:
        """Wait until an event has happened."""
        self._driver.synchronize(event)

    def deliver(
        self,
        address: int,
        nbytes: int,
        place: int,
        write: Callable[[int, Bytes], None],
        stop: threading.Event,
    ) -> bool:
        """Copy bytes from the device once the kernels that made them are done, and have them written in order.

        Parameters
        ----------
        place
            The offset of the first byte in its file: bytes keep their place within a page.
        write
            Receives the number of the first byte of each part, and the part; parts end at pages of the file.

        Returns False if `stop` was set before all was written.
        """
        self._driver.wait(self._copies_out, self._driver.record(self._kernels))
        pending: deque[tuple[int, Bytes, int, Event]] = deque()
        try:
            position = 0
            while position < nbytes:
                taken = None
                if len(pending) < _AHEAD:
                    taken = self._out.take(stop, wait=not pending)
                    if taken is None and not pending:
                        return False
                if taken is None:
                    self._write_first(pending, write)
                    continue
                number, slot = taken
                lead = (place + position) % PAGE
                part = slot[lead : lead + min(nbytes - position, slot.size - lead)]
                pending.append((number, part, position, None))
                self._driver.copy_out(address + position, part, self._copies_out)
                pending[-1] = (number, part, position, self._driver.record(self._copies_out))
                position += part.size
            while pending:
                self._write_first(pending, write)
        finally:
            while pending:
                number, _, _, event = pending.popleft()
                self._out.give(number, event)
        return True

    def _write_first(
        self, pending: deque[tuple[int, Bytes, int, Event]], write: Callable[[int, Bytes], None]
    ) -> None:
        number, part, position, event = pending[0]
        self._driver.synchronize(event)
        write(position, part)
        pending.popleft()
        self._out.give(number)

    def fetch(self, address: int, nbytes: int) -> Bytes:
        """Return bytes of the device in new memory."""
        data = np.empty(nbytes, np.uint8)
        with self._turn:
            self._launcher.fetch(address, data)
        return data

    def settle(self) -> None:
        """Wait until no enqueued work uses the arena any more, after a failure; what fails again is let go."""
        with suppress(DriverError):
            for stream in (self._copies_in, self._kernels, self._copies_out):
                self._driver.synchronize(self._driver.record(stream))

    def close(self) -> None:
        """Give everything back; a driver that fails by now loses it with the process."""
        self.settle()
        with suppress(DriverError):
            self._opened.close()
