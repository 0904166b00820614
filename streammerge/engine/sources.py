"""Elements of a tensor as its model has them: as they lie in a file, with an adapter, or gathered row by row."""

from __future__ import annotations

import numpy as np

from streammerge.dtypes import BITS, itemsize
from streammerge.engine.adapted import read_adapted
from streammerge.engine.gathered import gather
from streammerge.engine.memory import Bytes
from streammerge.engine.reader import Reader
from streammerge.engine.values import Scratch
from streammerge.index.derived import AdaptedRef, GatheredRef, SourceRef, scratch_bytes
from streammerge.index.header import TensorRef


def read_source(
    reader: Reader, ref: SourceRef, start: int, stop: int, slot: Bytes, scratch: Bytes, *, again: bool = False
) -> int:
    """Read elements `start` to `stop` of a tensor into a slot (see `plan.arena`); return where in it they begin.

    Parameters
    ----------
    scratch
        Room of `scratch_bytes(ref)`.
    again
        The same elements will be read once more.

    Raises
    ------
    WorldError
        If a file ends early or the device fails.
    """
    if isinstance(ref, TensorRef):
        first, last = (element * BITS[ref.dtype] // 8 for element in (start, stop))
        return reader.read_slot(ref.path, ref.offset + first, last - first, slot, again=again)
    _make(reader, ref, start, stop, slot, Scratch(scratch))
    return 0


def read_elements(reader: Reader, ref: SourceRef, start: int, stop: int) -> Bytes:
    """Return elements `start` to `stop` of a tensor in memory of their own: for a small or sparse look."""
    if isinstance(ref, TensorRef):
        first, last = (element * BITS[ref.dtype] // 8 for element in (start, stop))
        data = np.empty(last - first, np.uint8)
        reader.read_into(ref.path, ref.offset + first, data)
        return data
    data = np.empty((stop - start) * itemsize(ref.dtype), np.uint8)
    _make(reader, ref, start, stop, data, Scratch(np.empty(scratch_bytes(ref), np.uint8)))
    return data


def prefetch_source(reader: Reader, ref: SourceRef, start: int, stop: int) -> None:
    """Ask the kernel to begin reading what elements `start` to `stop` are made of, where that lies together."""
    if isinstance(ref, AdaptedRef):
        ref = ref.weight
    if isinstance(ref, TensorRef):
        first, last = (element * BITS[ref.dtype] // 8 for element in (start, stop))
        reader.prefetch(ref.path, ref.offset + first, last - first)


def _make(
    reader: Reader, ref: AdaptedRef | GatheredRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    """Compute or gather elements that lie in no file, to the beginning of `target`."""
    if isinstance(ref, AdaptedRef):
        read_adapted(reader, ref, start, stop, target, scratch)
    else:
        gather(reader, ref, start, stop, target, scratch)
