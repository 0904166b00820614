"""A GPU in this process's memory: copies are real, and everything happens as late as the order of events allows.

What was enqueued runs only when somebody waits for it, and only as far as that needs. So a kernel that does not wait for
its copies finds memory without them, a slot that is filled again too early is copied with the wrong bytes, and a file is
written with what was there before: each shows in the bytes of the output.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from streammerge.algebra.block import Applied, Block, Operand
from streammerge.backends.cpu.math import KernelMath
from streammerge.backends.gpu.driver import DriverError
from streammerge.io.buffer_pool import Bytes


@dataclass(eq=False)
class FakeStream:
    """What was enqueued, and how much of it has run."""

    name: int
    work: list[Callable[[], None]] = field(default_factory=list)
    done: int = 0


class FakeDriver:
    """See `Driver`.

    Parameters
    ----------
    nbytes
        Bytes of the device's memory.
    fails
        The name of a call and its number from 0: it fails, as does all that follows, if `for_ever`.
    room
        Bytes that one allocation may have; default: all.
    """

    def __init__(
        self, nbytes: int = 1 << 26, *, fails: tuple[str, int] | None = None, room: int | None = None
    ) -> None:
        self.memory_bytes = np.full(nbytes, 0xA5, np.uint8)
        self.base = self.memory_bytes.ctypes.data
        """The address of the first byte of the device: this process's own, so that kernels can run there."""
        self.calls: list[tuple[Any, ...]] = []
        self.counts: Counter[str] = Counter()
        self.launched: list[tuple[Any, ...]] = []
        self.runs: Any = None
        """Function that runs a loaded kernel; None: kernels do nothing."""
        self._fails, self._room = fails, nbytes if room is None else room
        self._lock = threading.RLock()
        self._next = -(-self.base // 256) * 256
        self.pinned: set[int] = set()
        self.closed = False

    def _note(self, name: str, *what: Any) -> None:
        number = self.counts[name]
        self.counts[name] += 1
        self.calls.append((name, *what))
        if self._fails is not None and self._fails == (name, number):
            raise DriverError(name, "planted")

    def memory(self) -> int:
        with self._lock:
            self._note("memory")
            return self.memory_bytes.size

    def allocate(self, nbytes: int) -> int:
        with self._lock:
            self._note("allocate", nbytes)
            if nbytes > self._room:
                raise MemoryError
            address, self._next = self._next, self._next + nbytes
            return address

    def free(self, address: int) -> None:
        with self._lock:
            self._note("free", address)

    def pin(self, buffer: Bytes) -> None:
        with self._lock:
            self._note("pin", buffer.nbytes)
            self.pinned.add(buffer.ctypes.data)

    def unpin(self, buffer: Bytes) -> None:
        with self._lock:
            self._note("unpin", buffer.nbytes)
            self.pinned.remove(buffer.ctypes.data)

    def stream(self) -> FakeStream:
        with self._lock:
            self._note("stream")
            return FakeStream(self.counts["stream"])

    def at(self, address: int, nbytes: int) -> Bytes:
        """Return a view of the device's memory."""
        first = address - self.base
        assert 0 <= first <= first + nbytes <= self.memory_bytes.size, "outside the device's memory"
        return self.memory_bytes[first : first + nbytes]

    def enqueue(self, stream: FakeStream, work: Callable[[], None]) -> None:
        """Enqueue anything."""
        with self._lock:
            stream.work.append(work)

    def copy_in(self, source: Bytes, address: int, stream: FakeStream) -> None:
        with self._lock:
            self._note("copy_in", address, source.nbytes, stream.name)
            target = self.at(address, source.nbytes)
            stream.work.append(lambda: target.__setitem__(slice(None), source))

    def copy_out(self, address: int, target: Bytes, stream: FakeStream) -> None:
        with self._lock:
            self._note("copy_out", address, target.nbytes, stream.name)
            source = self.at(address, target.nbytes)
            stream.work.append(lambda: target.__setitem__(slice(None), source))

    def clear(self, address: int, nbytes: int, stream: FakeStream) -> None:
        with self._lock:
            self._note("clear", address, nbytes, stream.name)
            stream.work.append(lambda: self.at(address, nbytes).__setitem__(slice(None), 0))

    def record(self, stream: FakeStream) -> tuple[FakeStream, int]:
        with self._lock:
            self._note("record", stream.name)
            return stream, len(stream.work)

    def wait(self, stream: FakeStream, event: tuple[FakeStream, int]) -> None:
        with self._lock:
            self._note("wait", stream.name, event[0].name)
            stream.work.append(lambda: self._run(event))

    def synchronize(self, event: tuple[FakeStream, int]) -> None:
        with self._lock:
            self._note("synchronize", event[0].name)
            self._run(event)

    def _run(self, event: tuple[FakeStream, int]) -> None:
        stream, end = event
        while stream.done < end:
            stream.done += 1
            stream.work[stream.done - 1]()

    def load(self, ptx: str, entry: str) -> tuple[str, str]:
        with self._lock:
            self._note("load", entry)
            return ptx, entry

    def launch(
        self,
        kernel: tuple[str, str],
        grid: tuple[int, int],
        threads: int,
        shared: int,
        parameters: Sequence[Any],
        stream: FakeStream,
    ) -> None:
        with self._lock:
            self._note("launch", kernel, stream.name)
            self.launched.append((kernel, grid, threads, shared, list(parameters)))
            if self.runs is not None:
                stream.work.append(lambda: self.runs(kernel, grid, list(parameters)))

    def close(self) -> None:
        self._note("close")
        self.closed = True


class Twin:
    """The kernels' work by their twins on the CPU, enqueued like a launch; scratch memory is asked for like theirs.

    Parameters
    ----------
    scratch
        Bytes of scratch per element that each call takes.
    """

    def __init__(self, block: Block, launcher: Any, residence: Any, driver: FakeDriver, scratch: int) -> None:
        self._block, self._launcher, self._residence = block, launcher, residence
        self._driver, self._scratch = driver, scratch

    def _run(self, call: Callable[[KernelMath], Any]) -> Any:
        place = self._launcher.allocate(self._scratch * self._block.n + 8)
        found: list[Any] = []
        offset = self._residence.address(Operand(0, "F32")) - self._driver.base
        memory = self._driver.memory_bytes[offset:]
        block = replace(self._block, buffer=memory[: memory.size // 8 * 8])
        stream = self._launcher._stream
        try:
            with self._driver._lock:
                self._driver._note("launch", "twin", stream.name)
            self._driver.enqueue(stream, lambda: found.append(call(KernelMath(block))))
            self._driver.synchronize(self._driver.record(stream))
        finally:
            self._launcher.free(place)
        return found[0]

    def apply(self, rule: Any, out: Operand) -> Applied:
        report: Applied = self._run(lambda math: math.apply(rule, out))
        self._residence.written(out)
        return report

    def __getattr__(self, name: str) -> Any:
        if not hasattr(KernelMath, name):
            raise AttributeError(name)
        return lambda *arguments: self._run(lambda math: getattr(math, name)(*arguments))
