"""Room for temporaries within a buffer that is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.io.buffer_pool import Bytes
from streammerge.io.pages import LINE, PAGE


class Scratch:
    """Room for temporaries, given out from its beginning; what a block takes is free again after it.

    Attributes
    ----------
    room
        All of it.
    """

    def __init__(self, room: Bytes) -> None:
        self.room = room
        self._taken = 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an array of no content in particular."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        begins = -(-self._taken // LINE) * LINE
        assert begins + nbytes <= self.room.size, (begins, nbytes, self.room.size)
        self._taken = begins + nbytes
        return self.room[begins : begins + nbytes].view(dtype).reshape(shape)

    def pages(self, nbytes: int) -> Bytes:
        """Return bytes that begin at a page of memory, as direct reads want them."""
        self._taken += -(self.room.ctypes.data + self._taken) % PAGE
        return self.take((nbytes,), np.dtype(np.uint8))

    def rest(self) -> Scratch:
        """Return what is left as room of its own; it is free again once that is out of use."""
        begins = -(-self._taken // LINE) * LINE
        return Scratch(self.room[begins:])
