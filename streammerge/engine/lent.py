"""Elements of tensors in files that a thread holds, for the stages that read the same ones."""

from __future__ import annotations

import threading

from streammerge.dtypes import BITS
from streammerge.formats.refs import Ref, TensorRef
from streammerge.io.buffer_pool import Bytes


class Lent(threading.local):
    """What the piece in hand has read, so that its stages do not read it again; each thread has its own."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], tuple[int, int, Bytes]] = {}

    def keep(self, tensor: TensorRef, start: int, stop: int, data: Bytes) -> None:
        """Remember that elements `start` to `stop` lie in `data`, which stays as it is while the piece is read."""
        self._held[tensor.path, tensor.offset] = start, stop, data

    def find(self, ref: Ref, start: int, stop: int) -> Bytes | None:
        """Return elements `start` to `stop` of a tensor, where they are held."""
        plain: TensorRef | None = getattr(ref, "plain", None)
        if plain is None or (held := self._held.get((plain.path, plain.offset))) is None:
            return None
        if not held[0] <= start <= stop <= held[1]:
            return None
        first, last = ((element - held[0]) * BITS[plain.dtype] // 8 for element in (start, stop))
        return held[2][first:last]

    def end(self) -> None:
        """Forget everything: the piece is read, and its buffer will be written over."""
        self._held.clear()
