"""Allocate temporaries within a buffer that counts as memory of the merge."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.io.buffer_pool import Bytes
from streammerge.io.pages import LINE, PAGE


class Scratch:
    """Space for temporaries, allocated from its beginning; each block's allocations are freed after it.

    Attributes
    ----------
    room
        The whole space.
    """

    def __init__(self, room: Bytes) -> None:
        self.room = room
        self._taken = 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an uninitialised array."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        begins = -(-self._taken // LINE) * LINE
        assert begins + nbytes <= self.room.size, (begins, nbytes, self.room.size)
        self._taken = begins + nbytes
        return self.room[begins : begins + nbytes].view(dtype).reshape(shape)

    def pages(self, nbytes: int) -> Bytes:
        """Return page-aligned bytes, as direct reads require."""
        self._taken += -(self.room.ctypes.data + self._taken) % PAGE
        return self.take((nbytes,), np.dtype(np.uint8))

    def rest(self) -> Scratch:
        """Return the remaining space as a separate `Scratch`; it is free again when that is no longer used."""
        begins = -(-self._taken // LINE) * LINE
        return Scratch(self.room[begins:])
