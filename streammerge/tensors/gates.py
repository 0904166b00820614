"""Read the tensors of a mixture of experts that no model has: gates, and experts with noise or a factor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.checkpoint.refs.gates import DRAWN_BLOCK, ChangedRef, DrawnRef, GateRef
from streammerge.dtypes import itemsize
from streammerge.formats.readers import reads
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.numerics.casts import BYTE, F32, F64, Floats, widened

if TYPE_CHECKING:
    from streammerge.numerics.philox import Key


@reads(GateRef)
def _read_gates(reader: Reader, ref: GateRef, start: int, stop: int, target: Bytes, scratch: Scratch) -> None:
    rows = ref.gates.rows(ref.layer, ref.first, ref.first + ref.shape[0])
    target[: 4 * (stop - start)].view(F32)[:] = rows.reshape(-1)[start:stop]


@reads(DrawnRef)
def _read_drawn(
    reader: Reader, ref: DrawnRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    out = target[: 4 * (stop - start)].view(F32)
    if ref.distribution == "zero":
        out[:] = 0
        return
    draw = _normal if ref.distribution == "normal" else _uniform
    for first in range(start, stop, DRAWN_BLOCK):
        last = min(stop, first + DRAWN_BLOCK)
        out[first - start : last - start] = draw(ref.key, first, last) * ref.limit


@reads(ChangedRef)
def _read_changed(
    reader: Reader, ref: ChangedRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    dtype = F64 if ref.dtype == "F64" else F32
    out = target[: dtype.itemsize * (stop - start)].view(dtype)
    width = itemsize(ref.source.dtype)
    for first in range(start, stop, DRAWN_BLOCK):
        last = min(stop, first + DRAWN_BLOCK)
        raw = scratch.rest().take((width * (last - first),), BYTE)
        rest = Scratch(scratch.room[width * DRAWN_BLOCK + 64 :])
        ref.source.read(reader, first, last, raw, rest)
        some = out[first - start : last - start]
        some[:] = widened(raw, ref.source.dtype, dtype)
        if ref.noise:
            some += (_normal(ref.key, first, last) * ref.noise).astype(dtype)
        some *= dtype.type(ref.scale)


def _normal(key: Key, start: int, stop: int) -> Floats:
    """Return standard normal numbers of elements `start` to `stop`, fp64."""
    from streammerge.numerics.normal import normal_of
    from streammerge.numerics.philox import words

    drawn: Floats = normal_of(words(key, start, stop)).numpy()
    return drawn


def _uniform(key: Key, start: int, stop: int) -> Floats:
    """Return numbers between -1 and 1 of elements `start` to `stop`, fp64."""
    from streammerge.numerics.normal import uniform_of
    from streammerge.numerics.philox import words

    drawn: Floats = (uniform_of(words(key, start, stop)) * 2.0 - 1.0).numpy()
    return drawn
