"""Parts of an output that come before their place in the stream of its bytes, and wait for it in memory."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence

from streammerge.io.buffer_pool import Bytes
from streammerge.planning.layout import Slot


class SideParts:
    """The side parts of one shard; may be filled from many threads.

    Parameters
    ----------
    slots
        Their places, in file order.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._begins = [slot.offset for slot in slots]
        self._lock = threading.Lock()
        self._held: dict[int, bytearray] = {}
        self._lacking = {slot.offset: slot.nbytes for slot in slots}
        """Bytes that are not there yet; 0 once a part has gone on its way."""
        self._seen: set[int] = set()

    def take(self, offset: int, data: Bytes) -> bool:
        """Keep bytes that belong to a side part; return False if they belong to none."""
        slot = self._at(offset)
        if slot is None:
            return False
        with self._lock:
            if offset not in self._seen:  # else they came before, from a rehearsal
                self._seen.add(offset)
                held = self._held.setdefault(slot.offset, bytearray(slot.nbytes))
                held[offset - slot.offset : offset - slot.offset + data.size] = data.data
                self._lacking[slot.offset] -= data.size
        return True

    def ready(self, offset: int) -> bytes | None:
        """Return the side part that begins at an offset, and forget it; None if there is none, or it is not whole."""
        with self._lock:
            if self._lacking.get(offset) != 0 or offset not in self._held:
                return None
            return bytes(self._held.pop(offset))

    def _at(self, offset: int) -> Slot | None:
        place = bisect_right(self._begins, offset) - 1
        if place < 0 or offset >= self._begins[place] + self._slots[place].nbytes:
            return None
        return self._slots[place]
