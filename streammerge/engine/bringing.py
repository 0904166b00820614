"""Bring operands to a GPU: elements as they are read, and quantised tensors as codes and scales that are decoded there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from streammerge.backends.gpu.lane import Lane
from streammerge.dtypes import itemsize
from streammerge.engine.worker import Worker
from streammerge.formats.refs import Ref
from streammerge.io.buffer_pool import Bytes
from streammerge.planning.job import Job
from streammerge.planning.schedule import ALIGN
from streammerge.tensors.coded.kinds import Step, aligned, coded_steps, is_coded
from streammerge.tensors.read import read_source
from streammerge.tensors.stacked import all_leaves, leaves

_SLOTS_OF_CODES = 16
"""Codes of one block that lie on the device at a time, in slots of the ring; they are decoded when the room is full."""
_NOTHING = np.zeros(0, np.uint8)


class Halted(Exception):
    """The worker was stopped while a tensor was brought."""


class _Waiting(NamedTuple):
    """Codes on the device that are not decoded yet."""

    decoding: Any
    arrays: list[int]
    out: int


def host_bytes(job: Job) -> int:
    """Return the bytes of this process's memory that bringing a job takes, in addition to the ring: scales, read and checked."""
    parts = (leaf for ref in job.held for leaf in all_leaves(ref))
    return max((leaf.scratch_bytes for leaf in parts if is_coded(leaf)), default=0)


def room_for_codes(lane: Lane, job: Job, first: int, last: int) -> int:
    """Return the bytes of device memory for the codes of elements `first` to `last` of a job's operands."""
    wanted, limit = 0, min(_SLOTS_OF_CODES * lane.slot_bytes, max(lane.slot_bytes, lane.arena.limit // 8))
    parts = (leaf for ref in job.held for leaf in leaves(ref, first, last))
    for leaf in parts:
        if not is_coded(leaf.ref):
            continue
        for step in coded_steps(leaf.ref, leaf.start, leaf.stop, lane.slot_bytes):
            wanted += step.nbytes
            if wanted >= limit:
                return limit
    return wanted


class Carrier:
    """Brings the operands of one block, by one thread.

    Parameters
    ----------
    worker
        Whose reader, GPU and stop it uses.
    room, nbytes
        The place for codes on the device, and its size: that of `room_for_codes`.
    """

    def __init__(self, worker: Worker, room: int, nbytes: int) -> None:
        self._worker, self._lane = worker, worker.lane
        self._room, self._nbytes, self._used = room, nbytes, 0
        self._waiting: list[_Waiting] = []
        self._decoded: Any = None
        self.event: Any = None
        """The end of the last copy."""

    def bring(self, ref: Ref, first: int, last: int, address: int) -> None:
        """Have elements `first` to `last` of a tensor copied, or their codes, part by part; they will lie at `address`.

        Raises
        ------
        Halted
            If the worker was stopped.
        """
        for leaf in leaves(ref, first, last):
            bring = self._bring_codes if is_coded(leaf.ref) else self._bring_elements
            bring(leaf.ref, leaf.start, leaf.stop, address + leaf.place * itemsize(ref.dtype))

    def _bring_elements(self, ref: Ref, first: int, last: int, address: int) -> None:
        worker, size = self._worker, itemsize(ref.dtype)
        most = self._lane.read_bytes // size
        step = most // ALIGN * ALIGN or most
        for start in range(first, last, step):
            stop = min(last, start + step)

            def read(slot: Bytes, start: int = start, stop: int = stop) -> Iterator[tuple[int, Bytes]]:
                begins = read_source(worker.reader, ref, start, stop, slot, _NOTHING, worker.stages)
                yield address + (start - first) * size, slot[begins : begins + (stop - start) * size]

            self._copy(read)

    def _bring_codes(self, ref: Ref, first: int, last: int, address: int) -> None:
        for step in coded_steps(ref, first, last, self._lane.slot_bytes):
            if self._used + step.nbytes > self._nbytes:
                self._make_room()
            self._copy(partial(self._read_codes, step, address, itemsize(ref.dtype)))

    def _read_codes(self, step: Step, address: int, size: int, slot: Bytes) -> list[tuple[int, Bytes]]:
        """Read a step into a slot; return its arrays, each with its place on the device."""
        with self._worker.stages.time("read"):
            codes = step.fill(self._worker.reader, slot)
        places, parts = [], []
        for array in codes.arrays:
            places.append(self._room + self._used if array.size else 0)
            if array.size:
                parts.append((places[-1], array))
            self._used += aligned(array.size)
        self._waiting.append(_Waiting(codes.decoding, places, address + codes.first * size))
        return parts

    def _copy(self, read: Callable[[Bytes], Iterable[tuple[int, Bytes]]]) -> None:
        self.event = self._lane.bring(read, self._worker.stop)
        if self.event is None:
            raise Halted

    def _make_room(self) -> None:
        """Have what was brought decoded, and wait for that."""
        with self._worker.stages.time("wait for the GPU"), self._lane.computing(self.event):
            self.decode()
        self.finish()
        self._used = 0

    def decode(self) -> None:
        """Enqueue the decoding of what was brought since the last time; it is this thread's turn, and copies are waited for."""
        if self._waiting:
            self._decoded = self._lane.decode(self._waiting)
            self._waiting.clear()

    def finish(self) -> None:
        """Wait for what was decoded, so that its memory can be used for something else."""
        if self._decoded is not None:
            self._lane.wait(self._decoded)
            self._decoded = None
