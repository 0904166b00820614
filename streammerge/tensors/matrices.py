"""Read and widen parts of stored tensors, and evenly spaced matrices such as factors of adapters."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from streammerge.checkpoint.refs.adapted import Factor
from streammerge.dtypes import itemsize
from streammerge.formats.refs import TensorRef
from streammerge.io.reader import Reader
from streammerge.numerics.casts import Floats, widened

_STEP = 1 << 18
"""Number of elements that are widened together."""


def computed_once(function: Callable[[Reader, Any], Floats]) -> Callable[[Reader, Any], Floats]:
    """Cache a result that takes a pass over a tensor, about a row in size, for later pieces; one thread computes it."""
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
"""A line is read separately if its span is less than 1 / this of the distance to the next line."""


def read_matrix(reader: Reader, factor: Factor, block: int, row: int, out: Floats) -> None:
    """Read rows of a factor from `row` on into `out`, as many rows and columns as it has, widened to its dtype.

    Parameters
    ----------
    block
        The index of the factor's matrix, which is the expert.
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
