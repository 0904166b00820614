"""Decode 4-bit codes as they are read, through tables of products; the bits do not depend on the cuts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.refs.codebooks import AT_ONCE, BlocksOf4BitsRef, Nvfp4Ref
from streammerge.errors import ModelError
from streammerge.formats.readers import reads
from streammerge.formats.refs import TensorRef
from streammerge.io.buffer_pool import Bytes
from streammerge.io.files import bad, quoted
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch
from streammerge.numerics.casts import from_bf16
from streammerge.numerics.casts import table as e4m3_table
from streammerge.numerics.packing import look_up, products_of_e4m3

_FIRST_BAD = 0x7F
"""F8_E4M3 codes from here on are NaN or negative, except 0x80, which is zero."""


@reads(Nvfp4Ref)
def read_nvfp4(reader: Reader, ref: Nvfp4Ref, start: int, stop: int, target: Bytes, scratch: Scratch) -> None:
    """Decode elements `start` to `stop` of a tensor to the beginning of `target`.

    Raises
    ------
    ModelError
        If a scale is NaN, infinite or negative, or a scale that divides is zero.
    WorldError
        If a file ends early or the device fails.
    """
    out = target[: 4 * (stop - start)].view(np.float32)
    per_matrix = ref.shape[-2] * ref.shape[-1]
    first = start
    while first < stop:
        matrix = first // per_matrix
        last = min(stop, (first // AT_ONCE + 1) * AT_ONCE, (matrix + 1) * per_matrix)
        table = products_of_e4m3(whole_scale(reader, ref, matrix), ref.divides)
        codes = _read(reader, ref.source, first // 2, -(-last // 2))
        # Groups do not cross the end of a row, so they are in the same order as the elements.
        begins, ends = first // ref.group, -(-last // ref.group)
        scales = scale_codes(reader, ref, begins, ends)
        part, before = out[first - start : last - start], first - begins * ref.group
        look_up(codes, first % 2, False, table, scales.astype(np.int32), before, ref.group, part)
        first = last


def whole_scale(reader: Reader, ref: Nvfp4Ref, matrix: int) -> float:
    """Return the last scale of a matrix.

    Raises
    ------
    ModelError
        If it is NaN, infinite or negative, or zero where it divides.
    """
    place = matrix if ref.whole.n_elements > 1 else 0
    factor = float(_read(reader, ref.whole, place, place + 1).view("<f4")[0])
    if not 0 <= factor < np.inf or (ref.divides and factor == 0):
        raise _refused(ref.whole, place, factor)
    return factor


def scale_codes(reader: Reader, ref: Nvfp4Ref, begins: int, ends: int) -> NDArray[np.uint8]:
    """Return the F8_E4M3 scales of groups `begins` to `ends`.

    Raises
    ------
    ModelError
        If one is NaN or negative.
    """
    scales = _read(reader, ref.scales, begins, ends)
    wrong = (scales >= _FIRST_BAD) & (scales != 0x80)
    if wrong.any():
        place = int(np.argmax(wrong))
        raise _refused(ref.scales, begins + place, float(from_bf16(e4m3_table("F8_E4M3"))[scales[place]]))
    return scales


@reads(BlocksOf4BitsRef)
def read_blocks_of_4_bits(
    reader: Reader, ref: BlocksOf4BitsRef, start: int, stop: int, target: Bytes, scratch: Scratch
) -> None:
    """Decode elements `start` to `stop` of a tensor to the beginning of `target`.

    Raises
    ------
    ModelError
        If the largest magnitude of a block is NaN, infinite or negative, or a value of the table is not finite.
    WorldError
        If a file ends early or the device fails.
    """
    out = target[: 4 * (stop - start)].view(np.float32)
    values = values_of_codes(reader, ref.map)
    step = max(2, min(AT_ONCE, ref.blocksize * AT_ONCE // 16))  # a table takes 64 bytes a block
    for first in range(start, stop, step):
        last = min(stop, first + step)
        codes = _read(reader, ref.source, first // 2, -(-last // 2))
        begins, ends = first // ref.blocksize, -(-last // ref.blocksize)
        with np.errstate(over="ignore"):
            tables = np.multiply.outer(largest_of_blocks(reader, ref, begins, ends), values)
        part, before = out[first - start : last - start], first - begins * ref.blocksize
        rows = np.arange(ends - begins, dtype=np.int32)
        look_up(codes, first % 2, True, tables, rows, before, ref.blocksize, part)


def largest_of_blocks(reader: Reader, ref: BlocksOf4BitsRef, begins: int, ends: int) -> NDArray[np.float32]:
    """Return the largest magnitudes of blocks `begins` to `ends`.

    Raises
    ------
    ModelError
        If one is NaN, infinite or negative.
    """
    raw = _read(reader, ref.absmax, begins, ends)
    found: NDArray[np.float32]
    if ref.nested is None:
        found = raw.view("<f4")
    else:
        inner = ref.nested
        first, last = begins // inner.blocksize, -(-ends // inner.blocksize)
        outer = _read(reader, inner.absmax, first, last).view("<f4")
        of_block = np.repeat(outer, inner.blocksize)[begins - first * inner.blocksize :][: ends - begins]
        with np.errstate(over="ignore", invalid="ignore"):
            found = values_of_codes(reader, inner.map)[raw] * of_block + np.float32(inner.offset)
    fine = (found >= 0) & (found < np.inf)
    if not fine.all():
        place = int(np.argmin(fine))
        raise _refused(ref.absmax, begins + place, float(found[place]))
    return found


def values_of_codes(reader: Reader, tensor: TensorRef) -> NDArray[np.float32]:
    """Return a table of values by code.

    Raises
    ------
    ModelError
        If a value is not finite.
    """
    values = _read(reader, tensor, 0, tensor.n_elements).view("<f4")
    if not np.isfinite(values).all():
        place = int(np.argmin(np.isfinite(values)))
        raise _refused(tensor, place, float(values[place]))
    return values


def _read(reader: Reader, tensor: TensorRef, first: int, last: int) -> NDArray[np.uint8]:
    offset, nbytes = tensor.span(first, last)
    raw = np.empty(nbytes, np.uint8)
    reader.read_into(tensor.path, offset, raw)
    return raw


def _refused(tensor: TensorRef, place: int, value: float) -> ModelError:
    return bad(
        tensor.path,
        f"tensor {quoted(tensor.name)}: scale {place} is {value:g}, which no scale can be: "
        "download or convert the model again",
    )
