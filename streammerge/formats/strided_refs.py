"""Non-contiguous views of storages, as in PyTorch files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from streammerge.formats.refs import MadeRef, TensorRef
from streammerge.records import dataclass

STRIDED_BLOCK = 1 << 20
"""Bytes of a file that are read together in order to take some of the elements."""

Box = list[tuple[int, int]]
"""The first index and the exclusive end on each axis."""


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes that together contain elements `start` to `stop` of a tensor, in order.

    >>> list(boxes((4, 3), 2, 10))
    [[(0, 1), (2, 3)], [(1, 3), (0, 3)], [(3, 4), (0, 1)]]
    """
    steps = row_major(shape)
    position = start
    while position < stop:
        # Find the outermost axis along which a whole step fits from here.
        axis = next(
            (i for i, step in enumerate(steps) if position % step == 0 and position + step <= stop),
            len(shape),
        )
        if axis == len(shape):  # a scalar
            yield []
            return
        index = [position // step % size for step, size in zip(steps, shape, strict=True)]
        n = min((stop - position) // steps[axis], shape[axis] - index[axis])
        yield [
            (index[i], index[i] + 1) if i < axis else (index[i], index[i] + n) if i == axis else (0, shape[i])
            for i in range(len(shape))
        ]
        position += n * steps[axis]


def row_major(shape: Sequence[int]) -> list[int]:
    """Return the strides, in elements, of a row-major tensor."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


@dataclass(frozen=True, slots=True)
class StridedRef(MadeRef):
    """A non-contiguous view of a storage: transposed, channels last, expanded."""

    source: TensorRef
    """The range of the file from the first element to the last, as one row."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Number of elements from one index to the next, per axis; not negative, 0 for an expanded axis."""

    why_made = "is not contiguous"

    @property
    def name(self) -> str:
        """The name in the model."""
        return self.source.name

    @property
    def dtype(self) -> str:
        """The stored dtype."""
        return self.source.dtype

    @property
    def scratch_bytes(self) -> int:
        """See `Ref`: a block of the file."""
        return STRIDED_BLOCK + 64
