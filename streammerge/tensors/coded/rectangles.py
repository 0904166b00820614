"""Ranges of a tensor as rectangles of its matrices, cut until each fits a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

from streammerge.tensors.integers import Rectangle

Axis = Literal["lines", "across"]
"""The axis that a rectangle is divided along: lines of the file, or the elements of every line."""
Divides = Callable[[Rectangle], Axis | None]
"""Function that returns how a rectangle must be divided; None if it fits."""
_WORDS = 32
"""A number of codes that fills whole words for any number of bits."""


def rectangles(start: int, stop: int, rows: int, columns: int) -> Iterator[Rectangle]:
    """Yield elements `start` to `stop` of matrices in order: the rest of a row, whole rows of a matrix, part of a row.

    >>> [(one.row, one.end, one.column, one.last) for one in rectangles(3, 19, 9, 5)]
    [(0, 1, 3, 5), (1, 3, 0, 5), (3, 4, 0, 4)]
    """
    while start < stop:
        line, column = divmod(start, columns)
        matrix, row = divmod(line, rows)
        if column or stop - start < columns:
            some = Rectangle(matrix, row, row + 1, column, min(columns, column + stop - start))
        else:
            some = Rectangle(matrix, row, min(rows, row + (stop - start) // columns), 0, columns)
        yield some
        start += some.shape[0] * some.shape[1]


def cut(part: Rectangle, divides: Divides, *, turned: bool) -> Iterator[Rectangle]:
    """Yield parts of a rectangle that fit, in the order of the file.

    Parameters
    ----------
    turned
        Whether lines of the file are columns of the tensor. Then cuts in both directions are between whole words.
    """
    axis = divides(part)
    if axis is None:
        yield part
        return
    by_rows = (axis == "lines") != turned
    first, last = (part.row, part.end) if by_rows else (part.column, part.last)
    grain = 1 if by_rows and not turned else _WORDS
    middle = (first + last) // 2 // grain * grain
    if middle <= first:
        middle = (first // grain + 1) * grain
    assert middle < last, "a slot holds the smallest part"
    for a, b in ((first, middle), (middle, last)):
        some = replace(part, row=a, end=b) if by_rows else replace(part, column=a, last=b)
        yield from cut(some, divides, turned=turned)
