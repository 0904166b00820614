"""The values of codes of a few bits, and of the scales that go with them, without a compiler."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.numerics.casts import F32, Floats, from_bf16, table, widened
from streammerge.numerics.compiled import is_compiled

GROUP = "decoding"
"""The compiled kernels that do the same."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_AT_ONCE = 1 << 15
"""Elements decoded together: so many are read before the bytes they lie in are written."""


@functools.cache
def values_of(element: str) -> NDArray[np.float32]:
    """Return the fp32 value of each code."""
    return np.array(_E2M1, np.float32) if element == "F4_E2M1" else from_bf16(table(element))


@functools.cache
def _powers() -> NDArray[np.float32]:
    """Return the value of each code of F8_E8M0: 2 to the power of the code less 127; of 255, NaN."""
    return np.append(np.exp2(np.arange(-127.0, 128.0)), np.nan).astype(np.float32)


def scale_values(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Return stored scales in fp32, exactly."""
    if dtype == "F8_E8M0":
        return _powers()[raw]
    return widened(raw, dtype, F32)


def first_bad_scale(scales: Floats) -> int | None:
    """Return the place of the first scale that is NaN, infinite or negative; None if there is none."""
    flat = scales.reshape(-1)
    if not flat.size or (flat.min() >= 0 and flat.max() < np.inf):  # a NaN fails both
        return None
    return int(np.argmax(~((flat >= 0) & (flat < np.inf))))


Pair = tuple[int, int]
"""Of rows and of columns."""


def decode(
    element: str,
    codes: NDArray[np.uint8],
    skip: int,
    pitch: int,
    scales: NDArray[np.float32],
    place: Pair,
    shape: Pair,
    extent: Pair,
    out: NDArray[np.float32],
) -> None:
    """Write ``value(code) * scale``, each product rounded once to fp32, for a rectangle of a matrix.

    Parameters
    ----------
    codes
        Bytes, row by row. They may be the last ones of `out`: each is read before the bytes it lies in are written.
    skip
        Codes before the first.
    pitch
        Codes from one row to the next.
    scales
        [r, c], from the scale of the first element on.
    place
        Of the first element in its matrix.
    shape
        Of the rectangle.
    extent
        Rows and columns of the matrix that one scale serves.
    out
        [rows * columns]
    """
    if is_compiled(GROUP):
        from streammerge.numerics import decoding

        kernel: Any = decoding.decode
        kernel(decoding.KINDS[element], codes, skip, pitch, scales, place, shape, extent, out)
    else:
        decode_in_order(element, codes, skip, pitch, scales, place, shape, extent, out)


def decode_in_order(
    element: str,
    codes: NDArray[np.uint8],
    skip: int,
    pitch: int,
    scales: NDArray[np.float32],
    place: Pair,
    shape: Pair,
    extent: Pair,
    out: NDArray[np.float32],
) -> None:
    """The same, by numpy: the formula that the kernels agree with bit by bit."""
    (row, column), (rows, columns) = place, shape
    values = values_of(element)
    for first in range(0, rows * columns, _AT_ONCE):
        flat = np.arange(first, min(rows * columns, first + _AT_ONCE))
        r, c = flat // columns, flat % columns
        at = skip + r * pitch + c
        some = codes[at] if values.size > 16 else (codes[at >> 1] >> (4 * (at & 1)).astype(np.uint8)) & 15
        scale = scales[
            (row + r) // extent[0] - row // extent[0], (column + c) // extent[1] - column // extent[1]
        ]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            out[first : first + flat.size] = values[some] * scale


def turn(tile: NDArray[np.float32], out: NDArray[np.float32], pitch: int) -> None:
    """Write the rows of a tile, [rows, n], as columns: ``out[j * pitch + i] = tile[i, j]``."""
    if is_compiled(GROUP):
        from streammerge.numerics import decoding

        decoding.turn(tile, out, pitch)
        return
    rows, n = tile.shape
    for j in range(n):
        out[j * pitch : j * pitch + rows] = tile[:, j]
