"""Find the part of a tensor that each scale applies to, from the shapes of both and the declaration."""

from __future__ import annotations

from streammerge.checkpoint.refs.quantized import Scales, Three, as_matrices
from streammerge.errors import ModelError
from streammerge.formats.parts import contiguous
from streammerge.formats.refs import SourceRef
from streammerge.io.files import bad, quoted

DEEPSEEK = (128, 128)
"""The block shape if none is declared and the shapes do not determine it."""
FLOATS = ("F32", "BF16", "F16", "F8_E8M0")
"""Dtypes of scales in any convention; U8 stands for E8M0 if that is declared."""


def scales_of(
    codes: SourceRef,
    shape: tuple[int, ...],
    scale: SourceRef,
    block: tuple[int, int] | None,
    *,
    bytes_are_e8m0: bool = False,
) -> Scales:
    """Return the scales of a tensor.

    There is one scale per matrix, row, column, or `block`. If no block is declared, there may be several scales per row
    for equal parts, or one per 128 x 128 elements.

    Parameters
    ----------
    shape
        The shape of the values, as stored.
    block
        Rows and columns that share a scale; None if not declared.
    bytes_are_e8m0
        Whether U8 scales are exponents.

    Raises
    ------
    ModelError
        If dtype or shape of the scales does not fit.
    """
    dtype = "F8_E8M0" if scale.dtype == "U8" and bytes_are_e8m0 else scale.dtype
    if dtype not in FLOATS:
        raise _refused(codes, scale, f"is {scale.dtype}, where scales are one of {', '.join(FLOATS)}")
    of_scale = _entries(shape, scale.shape)
    extent = None if of_scale is None else _extent(as_matrices(shape), of_scale, block)
    if of_scale is None or extent is None:
        what = f"has shape {list(scale.shape)}, which does not fit the {list(shape)} of its codes"
        raise _refused(
            codes, scale, what if block is None else f"{what} by blocks of {block[0]} x {block[1]}"
        )
    return Scales(contiguous(scale), dtype, of_scale, extent)


def _refused(codes: SourceRef, scale: SourceRef, what: str) -> ModelError:
    return bad(
        scale.path,
        f"tensor {quoted(codes.name)} is quantised, and its scale {quoted(scale.name)} {what}: "
        "download or convert the model again",
    )


def _entries(shape: tuple[int, ...], scale: tuple[int, ...]) -> Three | None:
    """Return the number of scales along each axis of `as_matrices`; None if the ranks do not fit."""
    if all(size == 1 for size in scale):
        return 1, 1, 1
    if len(scale) == 1:  # one per row, or per matrix
        return (
            (scale[0], 1, 1) if len(shape) == 3 else (1, scale[0], 1) if len(shape) != 1 else (1, 1, scale[0])
        )
    if len(scale) != len(shape):
        return None
    if len(shape) > 3:
        return (1, scale[0], 1) if all(size == 1 for size in scale[1:]) else None
    return as_matrices(scale)


def _extent(shape: Three, entries: Three, block: tuple[int, int] | None) -> Three | None:
    """Return the number of elements that share an entry along each axis; None if the shapes do not fit."""
    n, rows, columns = shape
    if entries[0] not in (1, n):
        return None
    matrices = 1 if entries[0] == n else max(1, n)
    for size in (*(() if block is None else (block,)), *_whole(rows, columns)):
        if entries[1:] == (-(-rows // size[0]), -(-columns // size[1])):
            return matrices, *size
    if block is not None:
        return None
    if entries[1] == rows and entries[2] and columns % entries[2] == 0:
        return matrices, 1, columns // entries[2]
    by_default = entries[1:] == (-(-rows // DEEPSEEK[0]), -(-columns // DEEPSEEK[1]))
    return (matrices, *DEEPSEEK) if by_default else None


def _whole(rows: int, columns: int) -> tuple[tuple[int, int], ...]:
    """Return the parts that need no declaration: the whole matrix, each row, each column."""
    rows, columns = max(1, rows), max(1, columns)
    return (rows, columns), (1, columns), (rows, 1)
