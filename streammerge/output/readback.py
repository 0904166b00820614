"""Read every byte of some files once from the disk; compute checksums of their parts, and count non-finite values.

Several threads read windows of the files, so that the disk is never idle while one computes. The checksums of a part's
windows are combined arithmetically, in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import field
from functools import reduce

from streammerge.dtypes import BITS
from streammerge.io.buffer_pool import Bytes, Pool
from streammerge.io.pages import slot_bytes
from streammerge.io.reader import Reader
from streammerge.numerics.crc32 import combine_all, crc32
from streammerge.numerics.finite import Tally, tally
from streammerge.planning.memory.budget import available_cpus
from streammerge.records import dataclass

_WINDOW = 8 << 20
"""Bytes read at once, the size of each thread's buffer."""
_STEP = 1 << 19
"""Bytes that are checksummed and then checked, so that they are in the CPU's cache the second time."""
_MOST_CPUS = 8
"""Most CPUs used; more would compute faster than any disk reads, and need more buffers."""
_TICK_SECONDS = 0.25


@dataclass(frozen=True)
class Part:
    """A range of a file with its own checksum: a tensor, a header, or a whole small file."""

    name: str
    offset: int
    nbytes: int
    dtype: str = "U8"
    """The dtype of its elements; floats are checked for non-finite values."""


@dataclass(frozen=True)
class Found:
    """The checksum, length and non-finite values of a part."""

    crc: int
    nbytes: int
    bad: Tally
    """Elements that are NaN or infinite."""


@dataclass
class _Reading:
    """Checksum, length and tally of each window read so far, by offset."""

    part: Part
    windows: dict[int, Found] = field(default_factory=dict)

    def found(self) -> Found:
        ordered = [self.windows[offset] for offset in sorted(self.windows)]
        crc = combine_all((found.crc, found.nbytes) for found in ordered)
        bad = reduce(Tally.then, (found.bad for found in ordered), Tally())
        return Found(crc, self.part.nbytes, bad)


@dataclass(frozen=True)
class _Window:
    path: str
    start: int
    stop: int
    parts: Sequence[_Reading]
    """The parts with bytes in this window, in order."""


def read_back(
    files: Mapping[str, Sequence[Part]], on_tick: Callable[[int], None] = lambda nbytes: None
) -> dict[str, list[Found]]:
    """Read files, each from the first byte of its first part to the last byte of its last one.

    Parameters
    ----------
    files
        The parts of each file by path, in order and without gaps.
    on_tick
        Called now and then with the bytes read so far.

    Returns
    -------
    By path, the checksum, length and non-finite values of each part.

    Raises
    ------
    ModelError
        If a file is missing.
    WorldError
        If the machine cannot read it.
    """
    readings = {path: [_Reading(part) for part in parts] for path, parts in files.items()}
    workers = min(_MOST_CPUS, available_cpus()) + 3  # some read while others compute
    reader, stop = Reader(from_disk=True), threading.Event()
    pool = Pool(workers * (slot_bytes(_WINDOW) + (1 << 16)))
    windows = _Shared(w for path, parts in readings.items() for w in _windows(path, parts))

    def work() -> None:
        with pool.lease(slot_bytes(_WINDOW), stop) as buffer:
            while buffer is not None and not stop.is_set() and (window := windows.next()) is not None:
                begins = reader.read_slot(window.path, window.start, window.stop - window.start, buffer)
                _look(window, buffer[begins : begins + window.stop - window.start])

    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="verify") as threads:
            try:
                pending = {threads.submit(work) for _ in range(workers)}
                while pending:
                    done, pending = wait(pending, _TICK_SECONDS, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    on_tick(reader.bytes_read)
            finally:
                stop.set()
    finally:
        pool.close()
        reader.close()
    return {path: [reading.found() for reading in parts] for path, parts in readings.items()}


class _Shared:
    """Hands out windows to threads, each window once."""

    def __init__(self, windows: Iterable[_Window]) -> None:
        self._windows = iter(windows)
        self._lock = threading.Lock()

    def next(self) -> _Window | None:
        with self._lock:
            return next(self._windows, None)


def _windows(path: str, readings: Sequence[_Reading]) -> Iterator[_Window]:
    """Cut a file into windows at boundaries of elements."""
    first = 0
    end = readings[-1].part.offset + readings[-1].part.nbytes if readings else 0
    start = readings[0].part.offset if readings else 0
    while start < end:
        last = first
        while last + 1 < len(readings) and readings[last + 1].part.offset < start + _WINDOW:
            last += 1
        stop = min(end, start + _WINDOW)
        part = readings[last].part
        if stop < part.offset + part.nbytes:
            stop -= (stop - part.offset) % max(1, BITS[part.dtype] // 8)
        yield _Window(path, start, stop, readings[first : last + 1])
        start = stop
        while first < last and readings[first].part.offset + readings[first].part.nbytes <= start:
            first += 1


def _look(window: _Window, data: Bytes) -> None:
    for reading in window.parts:
        part = reading.part
        first, last = max(window.start, part.offset), min(window.stop, part.offset + part.nbytes)
        if first >= last:
            continue
        width = max(1, BITS[part.dtype] // 8)
        value, bad = 0, Tally()
        for a in range(first, last, _STEP):
            b = min(last, a + _STEP)
            raw = data[a - window.start : b - window.start]
            value = crc32(raw, value)
            bad = bad.then(tally(raw, part.dtype, (a - part.offset) // width))
        reading.windows[first] = Found(value, last - first, bad)
