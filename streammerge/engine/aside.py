"""Undecided elements of a tensor that is merged while its thresholds are counted, kept as they were read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Applied, Block, Operand
from streammerge.dtypes import itemsize
from streammerge.io.buffer_pool import Bytes
from streammerge.numerics.casts import widened
from streammerge.planning.job import Job
from streammerge.records import dataclass

_COMPARED_AT_ONCE = 1 << 14
"""Elements that are widened at a time, so that this takes no memory to speak of."""


@dataclass
class Undecided:
    """The undecided elements of one piece."""

    dtypes: tuple[str, ...]
    """Those of the base and the models."""
    places: NDArray[np.uint32]
    """Places within the piece, in ascending order."""
    trial: Applied = field(default=Applied(0, ()))
    """The report of the merge of the whole piece by the rule that keeps surely."""
    values: list[Bytes] = field(default_factory=list)
    """The base's and the models' elements."""

    def inputs(self, first: int, last: int) -> Iterator[NDArray[np.float32]]:
        """Yield some elements of the base and of each model, in fp32."""
        for i in range(len(self.dtypes)):
            yield self._input(i, first, last).astype(np.float32, copy=False)

    def _input(self, number: int, first: int, last: int) -> NDArray[Any]:
        width = itemsize(self.dtypes[number])
        raw = self.values[number][first * width : last * width]
        return widened(raw, self.dtypes[number], np.dtype(np.float32))

    def tied(self, model: int, pattern: int) -> Iterator[NDArray[np.uint32]]:
        """Yield the places where the magnitude of a model's task vector, without a drop, has a pattern; some at a time."""
        for first in range(0, self.places.size, _COMPARED_AT_ONCE):
            last = min(self.places.size, first + _COMPARED_AT_ONCE)
            base, other = (self._input(number, first, last) for number in (0, 1 + model))
            patterns = (other - base).view(np.uint32) & np.uint32(0x7FFFFFFF)
            yield self.places[first:last][patterns == pattern]


class Aside:
    """The memory of all undecided elements of a tensor; `put` may be called from many threads."""

    def __init__(self, job: Job, room: Bytes) -> None:
        self._dtypes = tuple(ref.dtype for ref in job.inputs)
        self._room = room
        self._first_free = 0
        self._lock = threading.Lock()

    def put(self, loaded: Block, places: NDArray[np.int64]) -> Undecided | None:
        """Copy the values of elements; None if there is no room."""
        assert loaded.base is not None
        operands = (loaded.base, *loaded.models)
        parts = [_aligned(places.size * width) for width in (4, *(itemsize(one.dtype) for one in operands))]
        with self._lock:
            begins = self._first_free
            if begins + sum(parts) > self._room.size:
                return None
            self._first_free = begins + sum(parts)
        kept = Undecided(self._dtypes, self._room[begins : begins + 4 * places.size].view(np.uint32))
        kept.places[:] = places
        begins += parts[0]
        for operand, part in zip(operands, parts[1:], strict=True):
            kept.values.append(self._taken(loaded, operand, places, self._room[begins : begins + part]))
            begins += part
        return kept

    @staticmethod
    def _taken(loaded: Block, operand: Operand, places: NDArray[np.int64], room: Bytes) -> Bytes:
        width = itemsize(operand.dtype)
        words = np.uint16 if width == 2 else np.uint32
        source = loaded.buffer[operand.offset : operand.offset + loaded.n * width].view(words)
        taken = room[: places.size * width]
        np.take(source, places, out=taken.view(words), mode="clip")
        return taken


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 8) * 8
