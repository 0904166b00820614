"""Small tensors that describe how larger ones are stored (shapes and settings), read when a model is opened."""

from __future__ import annotations

import struct

from streammerge.errors import ModelError
from streammerge.formats.parts import contiguous
from streammerge.formats.refs import SourceRef
from streammerge.io.files import bad, quoted, read_exactly, reading

MOST_BYTES = 4096
"""Most bytes of a small tensor; shapes and settings take less."""
AGAIN = "download or convert the model again"
"""The cure for files that do not fit together."""


def small_bytes(ref: SourceRef) -> bytes:
    """Return the bytes of a small tensor.

    Raises
    ------
    ModelError
        If it is not small, or the file cannot be opened.
    WorldError
        If the machine cannot read it.
    """
    tensor = contiguous(ref)
    if tensor.nbytes > MOST_BYTES:
        raise misfit(ref, f"has {tensor.nbytes} bytes, where at most {MOST_BYTES} are expected")
    with reading(tensor.path) as (fd, _):
        return read_exactly(fd, tensor.nbytes, tensor.offset, tensor.path)


def whole_numbers(ref: SourceRef) -> tuple[int, ...]:
    """Return the entries of a small tensor of integers.

    Raises
    ------
    ModelError
        If its dtype is not an integer dtype, or as in `small_bytes`.
    """
    kinds = {"I64": "q", "I32": "i", "U8": "B"}
    if ref.dtype not in kinds:
        raise misfit(ref, f"is {ref.dtype}, where one of {', '.join(kinds)} is expected")
    return struct.unpack(f"<{ref.n_elements}{kinds[ref.dtype]}", small_bytes(ref))


def misfit(ref: SourceRef, what: str, cure: str = AGAIN) -> ModelError:
    """Return the error for a tensor that does not fit the tensors it belongs to."""
    return bad(ref.path, f"tensor {quoted(ref.name)} {what}: {cure}")
