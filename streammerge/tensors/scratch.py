"""Values of elements in another dtype, and room for them: what tensors that are made as they are read are made with."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.refs.made import Factor
from streammerge.dtypes import itemsize
from streammerge.formats.safetensors import TensorRef
from streammerge.io.buffer_pool import Bytes
from streammerge.io.pages import PAGE
from streammerge.io.reader import Reader

_STEP = 1 << 18
"""Elements widened together."""
BYTE = np.dtype(np.uint8)
F32 = np.dtype(np.float32)
F64 = np.dtype(np.float64)
Floats = NDArray[Any]


class Scratch:
    """Room for temporaries, given out from its beginning; what a block takes is free again after it."""

    def __init__(self, room: Bytes) -> None:
        self._room = room
        self._taken = 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Floats:
        """Return an array of no content in particular."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        begins = -(-self._taken // 64) * 64
        assert begins + nbytes <= self._room.size, (begins, nbytes, self._room.size)
        self._taken = begins + nbytes
        return self._room[begins : begins + nbytes].view(dtype).reshape(shape)

    def pages(self, nbytes: int) -> Bytes:
        """Return bytes that begin at a page of memory, as direct reads want them."""
        self._taken += -(self._room.ctypes.data + self._taken) % PAGE
        return self.take((nbytes,), BYTE)

    def rest(self) -> Scratch:
        """Return what is left as room of its own; it is free again once that is out of use."""
        begins = -(-self._taken // 64) * 64
        return Scratch(self._room[begins:])


def computed_once(function: Callable[[Reader, Any], Floats]) -> Callable[[Reader, Any], Floats]:
    """Keep what takes a pass over a tensor, a row or so of it, for the pieces that follow; one thread computes it."""
    cached = functools.lru_cache(maxsize=128)(function)
    lock = threading.Lock()

    def one_at_a_time(reader: Reader, ref: Any) -> Floats:
        with lock:
            return cached(reader, ref)

    return one_at_a_time


def read_widened(reader: Reader, ref: TensorRef, first: int, last: int, out: Floats) -> None:
    """Read elements of a tensor into `out`, widened to its dtype."""
    width = itemsize(ref.dtype)
    for begin in range(first, last, _STEP):
        end = min(last, begin + _STEP)
        raw = np.empty((end - begin) * width, np.uint8)
        reader.read_into(ref.path, ref.offset + begin * width, raw)
        out[begin - first : end - first] = widened(raw, ref.dtype, out.dtype)


_SPARSE = 16
"""A line of a matrix that takes less than one in so many of the elements up to the next is read by itself."""


def read_matrix(reader: Reader, factor: Factor, block: int, row: int, out: Floats) -> None:
    """Read as many rows and columns of a factor as `out` has, from `row` on, widened to its dtype.

    Parameters
    ----------
    block
        Which of the factor's matrices: the expert.
    """
    begin = factor.first + block * factor.block_step + row * factor.row_step
    outer, inner = factor.row_step, factor.column_step
    if outer < inner:
        outer, inner, out = inner, outer, out.T
    n_lines, length = out.shape
    together = 1 if ((length - 1) * inner + 1) * _SPARSE < outer else max(1, _STEP // max(1, outer))
    part = max(1, _STEP // max(1, inner))
    width = itemsize(factor.tensor.dtype)
    for line in range(0, n_lines, together):
        lines = min(together, n_lines - line)
        for place in range(0, length, part):
            n = min(part, length - place)
            first = begin + line * outer + place * inner
            span = (lines - 1) * outer + (n - 1) * inner + 1
            raw = np.empty(span * width, np.uint8)
            reader.read_into(factor.tensor.path, factor.tensor.offset + first * width, raw)
            some = np.lib.stride_tricks.as_strided(
                raw.view(f"u{width}"), (lines, n), (outer * width, inner * width)
            )
            values = widened(np.ascontiguousarray(some).view(np.uint8), factor.tensor.dtype, out.dtype)
            out[line : line + lines, place : place + n] = values.reshape(lines, n)


def widened(raw: Bytes, dtype: str, to: np.dtype[Any]) -> Floats:
    """Return the values of elements in a wider dtype, exactly; one after the other."""
    raw = raw.reshape(-1)
    if dtype == "BF16":
        return (
            (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(to, copy=False)
        )
    return raw.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(to, copy=False)


def rounded(values: Floats, dtype: str) -> Bytes:
    """Return fp64 values rounded once, to nearest even, as the bytes of a dtype."""
    with np.errstate(over="ignore"):
        if dtype != "BF16":
            return values.astype({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).view(
                np.uint8
            )
        near = values.astype(np.float32)
    bits = near.view(np.uint32)
    # Rounded to odd first, so that the rounding to 16 bits is the only one.
    wide = near.astype(F64)
    away = (np.abs(wide) > np.abs(values)).astype(np.uint32)
    bits = np.where(wide != values, (bits - away) | np.uint32(1), bits)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    bits = np.where(np.isnan(values), np.uint32(0x7FC0), bits)
    return bits.astype(np.uint16).view(np.uint8)
