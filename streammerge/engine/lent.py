"""Elements that a thread has read from files, kept for the stages that read the same tensors."""

from __future__ import annotations

import threading

from streammerge.dtypes import BITS
from streammerge.formats.refs import Ref, TensorRef
from streammerge.io.buffer_pool import Bytes


class Lent(threading.local):
    """The elements that the current piece has read, kept so that its stages do not read them again; one per thread."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], tuple[int, int, Bytes]] = {}

    def keep(self, tensor: TensorRef, start: int, stop: int, data: Bytes) -> None:
        """Remember that elements `start` to `stop` lie in `data`, which must not change while the piece is read."""
        self._held[tensor.path, tensor.offset] = start, stop, data

    def find(self, ref: Ref, start: int, stop: int) -> Bytes | None:
        """Return elements `start` to `stop` of a tensor, or None if they are not all held."""
        plain: TensorRef | None = getattr(ref, "plain", None)
        if plain is None or (held := self._held.get((plain.path, plain.offset))) is None:
            return None
        if not held[0] <= start <= stop <= held[1]:
            return None
        first, last = ((element - held[0]) * BITS[plain.dtype] // 8 for element in (start, stop))
        return held[2][first:last]

    def end(self) -> None:
        """Forget everything: the piece has been read, and its buffer will be overwritten."""
        self._held.clear()
