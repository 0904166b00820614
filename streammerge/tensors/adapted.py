"""Compute weights with a LoRA adapter, ``W + s L R`` (Hu et al., 2021), or with DoRA, one block of rows at a time.

The arithmetic is fp32 (fp64 if the weight is fp64) in a fixed order: each product is added to the sum of the products
of lower ranks, and each step is rounded. Neither the cut nor the machine changes a bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from streammerge.checkpoint.refs.adapted import AdaptedRef, AdapterDelta
from streammerge.dtypes import itemsize
from streammerge.formats.readers import reads
from streammerge.formats.refs import READ_BLOCK
from streammerge.io.buffer_pool import Bytes
from streammerge.io.pages import slot_bytes
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.numerics.casts import BYTE, F32, F64, Floats, widened
from streammerge.numerics.compiled import is_compiled
from streammerge.tensors.matrices import computed_once, read_matrix, read_widened


@reads(AdaptedRef)
def read_adapted(
    reader: Reader, ref: AdaptedRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    """Compute elements `start` to `stop` of a weight with its adapter; write them to the beginning of `target`.

    Raises
    ------
    WorldError
        If a file ends early or the device fails.
    """
    _Adapter(reader, ref, scratch).read(start, stop, target)


@reads(AdapterDelta)
def read_delta(
    reader: Reader, ref: AdapterDelta, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    """Compute elements `start` to `stop` of ``s L R`` in fp64; write them to the beginning of `target`.

    Raises
    ------
    WorldError
        If a file ends early or the device fails.
    """
    adapted = ref.source
    adapter = _Adapter(reader, adapted, scratch, F64)
    out = target[: (stop - start) * itemsize(ref.dtype)].view(F64)
    for row, end, first, last in segments(start, stop, adapted.columns, adapted.block_rows):
        position = row * adapted.columns + first - start
        part = out[position : position + (end - row) * (last - first)].reshape(end - row, -1)
        adapter.products(row, end, first, last, part, scratch.rest())


def segments(
    start: int, stop: int, columns: int, block_rows: int | None = None, most: int = READ_BLOCK
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first row, end, first column, end) of consecutive pieces of at most `most` elements.

    Each piece is contiguous: whole rows, or a part of one row. If `block_rows` is given, a piece is within one block.
    """
    rows = max(1, most // columns)
    while start < stop:
        row, column = divmod(start, columns)
        if column or stop - start < columns or columns > most:
            end = min(columns, column + most, column + stop - start)
            yield row, row + 1, column, end
            start += end - column
        else:
            last = min(row + rows, stop // columns)
            if block_rows is not None:
                last = min(last, (row // block_rows + 1) * block_rows)
            yield row, last, 0, columns
            start = last * columns


class _Adapter:
    """Computes elements of one weight with its adapter."""

    def __init__(
        self, reader: Reader, ref: AdaptedRef, scratch: Scratch, dtype: np.dtype[Any] | None = None
    ) -> None:
        self._reader, self._ref = reader, ref
        self._dtype = dtype or (F64 if ref.dtype == "F64" else F32)
        self._right = scratch.take((ref.rank, ref.columns), self._dtype)
        self._scratch = scratch
        self._block_of_right: int | None = None

    def read(self, start: int, stop: int, target: Bytes) -> None:
        """Compute elements `start` to `stop`."""
        ref = self._ref
        out = target[: (stop - start) * itemsize(ref.dtype)].view(self._dtype)
        for row, end, first, last in segments(start, stop, ref.columns, ref.block_rows):
            position = row * ref.columns + first - start
            part = out[position : position + (end - row) * (last - first)].reshape(end - row, -1)
            self._compute(row, end, first, last, part, self._scratch.rest())
            if ref.magnitude is not None:
                part *= self._factors(row, end, first, last)

    def _compute(self, row: int, end: int, first: int, last: int, out: Floats, scratch: Scratch) -> None:
        """Compute ``W + s L R`` for one contiguous piece of one expert."""
        total = scratch.take(out.shape, self._dtype)
        self.products(row, end, first, last, total, scratch)
        start = row * self._ref.columns + first
        np.add(self._weight(start, start + out.size, scratch).reshape(out.shape), total, out=out)

    def products(self, row: int, end: int, first: int, last: int, out: Floats, scratch: Scratch) -> None:
        """Compute ``s L R`` for one contiguous piece of one expert."""
        ref = self._ref
        block, row_there = divmod(row, ref.block_rows)
        self._load_right(block)
        left = scratch.take((end - row, ref.rank), self._dtype)
        read_matrix(self._reader, ref.left, block, row_there, left)
        add_products(left, self._right, first, last, out)
        out *= self._dtype.type(ref.scale)

    def _load_right(self, block: int) -> None:
        if self._block_of_right == block:
            return
        if self._ref.right is None:
            self._right[:] = 1
        else:
            read_matrix(self._reader, self._ref.right, block, 0, self._right)
        self._block_of_right = block

    def _weight(self, start: int, stop: int, scratch: Scratch) -> Floats:
        """Return elements of the unchanged weight, widened."""
        weight = self._ref.source
        width = itemsize(weight.dtype)
        nbytes = (stop - start) * width
        if (plain := weight.plain) is not None:
            slot = scratch.pages(slot_bytes(nbytes))
            begins = self._reader.read_slot(plain.path, plain.offset + start * width, nbytes, slot)
            raw = slot[begins : begins + nbytes]
        else:
            raw = scratch.take((nbytes,), BYTE)
            weight.read(self._reader, start, stop, raw, scratch.rest())
        return widened(raw, weight.dtype, self._dtype)

    def _factors(self, row: int, end: int, first: int, last: int) -> Floats:
        """Return the factors by which DoRA multiplies a block: for each output feature, its magnitude over its norm."""
        ref = self._ref
        if ref.by_column:
            return _column_factors(self._reader, ref)[first:last]
        squares = np.zeros(end - row)
        for r0, r1, c0, c1 in segments(row * ref.columns, end * ref.columns, ref.columns):
            squares[r0 - row : r1 - row] += self.squares(r0, r1, c0, c1).sum(axis=1)
        return _over_norm(self._reader, ref, row, end, squares)[:, None]

    def squares(self, row: int, end: int, first: int, last: int) -> Floats:
        """Return the squares, in fp64, of a contiguous block before magnitudes are applied."""
        scratch = self._scratch.rest()
        block = scratch.take((end - row, last - first), self._dtype)
        squares = scratch.take(block.shape, F64)
        self._compute(row, end, first, last, block, scratch.rest())
        np.multiply(block, block, out=squares, dtype=F64)
        return squares


@computed_once
def _column_factors(reader: Reader, ref: AdaptedRef) -> Floats:
    """Return DoRA's factor of each column of a weight stored as (in, out), which takes a pass over the weight."""
    adapter = _Adapter(reader, ref, Scratch(np.empty(ref.scratch_bytes, np.uint8)))
    squares = np.zeros(ref.columns)
    for row, end, first, last in segments(0, ref.n_elements, ref.columns):
        squares[first:last] += adapter.squares(row, end, first, last).sum(axis=0)
    return _over_norm(reader, ref, 0, ref.columns, squares)


def _over_norm(reader: Reader, ref: AdaptedRef, first: int, last: int, squares: Floats) -> Floats:
    assert ref.magnitude is not None
    dtype = F64 if ref.dtype == "F64" else F32
    magnitude = np.empty(last - first, dtype)
    read_widened(reader, ref.magnitude, first, last, magnitude)
    with np.errstate(divide="ignore", invalid="ignore"):  # a row of zeros; non-finite values are found later
        return magnitude / np.sqrt(squares).astype(dtype)


def add_products(left: Floats, right: Floats, first: int, last: int, out: Floats) -> None:
    """Write ``left @ right[:, first:last]`` to `out`, all of one dtype; rounded products are added in order of rank."""
    if is_compiled("adapters"):
        from streammerge.numerics.products import add_products as compiled

        compiled(left, right, first, last, out)
    else:
        products_in_order(left, right[:, first:last], out)


def products_in_order(left: Floats, right: Floats, out: Floats) -> None:
    """Write ``left @ right`` to `out` with numpy; the kernel gives the same bits."""
    out[:] = 0
    for k in range(left.shape[1]):
        out += left[:, k : k + 1] * right[k]
