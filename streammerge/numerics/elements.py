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
_AT_ONCE = 1 << 15
"""Elements decoded together: so many are read before the bytes they lie in are written."""


@functools.cache
def values_of(element: str) -> NDArray[np.float32]:
    """Return the fp32 value of each code."""
    return from_bf16(table(element))


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


def decode(
    element: str,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    place: tuple[int, int],
    columns: int,
    extent: tuple[int, int],
    out: NDArray[np.float32],
) -> None:
    """Write ``value(code) * scale``, each product rounded once to fp32, for some rows of a matrix or a part of one.

    Parameters
    ----------
    codes
        [n], row by row. They may lie in the last quarter of `out`: each is read before the bytes it lies in are written.
    scales
        [r, c], from the scale of the first element on.
    place
        Row and column of the first element in its matrix.
    columns
        Elements of each row; n is a multiple of it.
    extent
        Rows and columns of the matrix that one scale serves.
    out
        [n]
    """
    if is_compiled(GROUP):
        from streammerge.numerics import decoding

        kernel: Any = decoding.KERNELS[element]
        kernel(codes, scales, *place, columns, *extent, out)
    else:
        decode_in_order(values_of(element), codes, scales, place, columns, extent, out)


def decode_in_order(
    values: NDArray[np.float32],
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    place: tuple[int, int],
    columns: int,
    extent: tuple[int, int],
    out: NDArray[np.float32],
) -> None:
    """The same, by numpy: the formula that the kernels agree with bit by bit."""
    row, column = place
    for first in range(0, codes.size, _AT_ONCE):
        flat = np.arange(first, min(codes.size, first + _AT_ONCE))
        rows, places = (row + flat // columns) // extent[0], (column + flat % columns) // extent[1]
        scale = scales[rows - row // extent[0], places - column // extent[1]]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            out[first : first + flat.size] = values[codes[first : first + flat.size]] * scale
