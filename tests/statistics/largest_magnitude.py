"""A statistic of one's own, in one file: the largest magnitude of a task vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from streammerge.algebra.block import BlockMath, Call
from streammerge.algebra.extent import Extent
from streammerge.algebra.task_vectors import TaskVector
from streammerge.statistics.base import Lock, Measurement, NotFiniteError, Reducer, Statistic

_INFINITE = 0x7F800000


@dataclass(frozen=True)
class LargestMagnitude(Statistic[float]):
    """Ask for the largest magnitude of a task vector, exactly."""

    vector: TaskVector
    extent: Extent = Extent.TENSOR

    def calls(self) -> tuple[Call, ...]:
        return (Call("count_keys", self.vector),)

    def placeholder(self) -> float:
        return 1.0

    def reducer(self, over: Measurement) -> Reducer[float]:
        return _Largest(self.vector)

    def to_json(self, value: float) -> object:
        return {"float": value.hex()}

    def from_json(self, plain: Any) -> float:
        match plain:
            case {"float": str(text)}:
                return float.fromhex(text)
        raise ValueError("no magnitude")


class _Largest(Reducer[float]):
    """Keeps the largest fp32 bit pattern: patterns order as magnitudes do."""

    def __init__(self, vector: TaskVector) -> None:
        self._vector, self._lock, self._key = vector, Lock(), 0

    def measured(self, ordinal: int, start: int, n: int, math: BlockMath) -> int:
        _, key = math.count_keys(self._vector, 0, 0, 0, np.zeros(1, np.int32))
        if key >= _INFINITE:
            raise NotFiniteError(ordinal)
        return key

    def part(self) -> int:
        return self._key

    def absorb(self, part: int) -> None:
        with self._lock:
            self._key = max(self._key, part)

    @property
    def value(self) -> float:
        return float(np.uint32(self._key).view(np.float32))
