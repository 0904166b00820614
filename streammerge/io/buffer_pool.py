"""A pool of reusable buffers whose total size never exceeds the capacity.

Each region is an anonymous mapping, so freeing it returns the memory at once, which a heap does not guarantee. Leases are
granted in the order of requests, so large chunks do not starve. A lease takes a part of an idle region, whose pages are
there already, and leaves the rest to others; a part that comes back joins its idle neighbours.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from streammerge.records import dataclass

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_GRAIN = 1 << 16


@dataclass(eq=False)
class _Region:
    """One mapping."""

    mapped: mmap.mmap
    memory: Bytes
    """All of it."""
    held: int
    """Bytes that are lent or idle; those of the others have gone back to the system."""


@dataclass(frozen=True)
class _Part:
    """A range of a region."""

    region: _Region
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def cut(self, at: int) -> tuple[_Part, _Part]:
        """Return its first `at` bytes, and the others."""
        middle = self.start + at
        return _Part(self.region, self.start, middle), _Part(self.region, middle, self.stop)


class Pool:
    """Leases byte buffers within a capacity.

    Parameters
    ----------
    capacity
        Most bytes of all buffers, leased and idle.
    prepare, dismiss
        Called with every buffer after it is created, and before it is freed. Such buffers are lent whole.
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
        self._idle: list[_Part] = []
        self._held = 0
        self._lock = threading.Lock()
        self._queue: deque[threading.Condition] = deque()
        """Who waits, in order; only the first is woken, since all others would wait on."""

    @contextmanager
    def lease(self, nbytes: int, stop: threading.Event) -> Iterator[Bytes | None]:
        """Lend a buffer of at least `nbytes`; None if `stop` was set while waiting."""
        size = max(1, -(-nbytes // _GRAIN)) * _GRAIN
        assert size <= self._capacity + _GRAIN, (nbytes, self._capacity)
        part = self._acquire(size, stop)
        try:
            yield None if part is None else part.region.memory[part.start : part.stop]
        finally:
            if part is not None:
                with self._lock:
                    self._return(part)
                    self._wake_first()

    def _acquire(self, size: int, stop: threading.Event) -> _Part | None:
        turn = threading.Condition(self._lock)
        with turn:
            self._queue.append(turn)
            try:
                while not stop.is_set():
                    if self._queue[0] is turn and (part := self._take(size)) is not None:
                        return part
                    turn.wait(timeout=0.2)
                return None
            finally:
                self._queue.remove(turn)
                self._wake_first()

    def _wake_first(self) -> None:
        if self._queue:
            self._queue[0].notify()

    def _take(self, size: int) -> _Part | None:
        fitting = [part for part in self._idle if size <= part.size]
        if fitting:
            # Fresh pages cost faults and zeroing. A prepared buffer is lent whole, and others wait for what is not used of it.
            best = min(fitting, key=lambda part: part.size)
            self._idle.remove(best)
            if self._prepare is None and size < best.size:
                best, rest = best.cut(size)
                self._idle.append(rest)
            return best
        limit = max(self._capacity, size)
        if self._held - sum(part.size for part in self._idle) + size > limit:
            return None
        while self._held + size > limit:
            self._give_up(self._held + size - limit)
        mapped = map_memory(size)
        region = _Region(mapped, np.frombuffer(mapped, dtype=np.uint8), size)
        if self._prepare is not None:
            self._prepare(region.memory)
        self._held += size
        return _Part(region, 0, size)

    def _return(self, part: _Part) -> None:
        """Make a part idle, as one with its idle neighbours."""
        start, stop = part.start, part.stop
        for other in [one for one in self._idle if one.region is part.region]:
            if other.stop == start or other.start == stop:
                start, stop = min(start, other.start), max(stop, other.stop)
                self._idle.remove(other)
        self._idle.append(_Part(part.region, start, stop))

    def _give_up(self, needed: int) -> None:
        """Give up to `needed` bytes of the part that has been idle longest back to the system; of a prepared buffer all."""
        part = self._idle.pop(0)
        whole = -(-needed // _GRAIN) * _GRAIN
        if self._prepare is None and whole < part.size:
            rest, part = part.cut(part.size - whole)
            self._idle.insert(0, rest)
        region = part.region
        region.held -= part.size
        self._held -= part.size
        if self._dismiss is not None:
            self._dismiss(region.memory)
        if region.held:
            region.mapped.madvise(mmap.MADV_DONTNEED, part.start, part.size)

    def close(self) -> None:
        """Free all idle buffers."""
        with self._lock:
            while self._idle:
                self._give_up(self._idle[0].size)


def map_memory(size: int) -> mmap.mmap:
    """Map fresh memory, in huge pages if possible, which need far fewer faults and pins for I/O."""
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped
