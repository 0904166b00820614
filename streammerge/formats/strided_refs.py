"""Views of storages whose elements do not lie one after the other, as PyTorch files hold them."""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.formats.refs import MadeRef, TensorRef

STRIDED_BLOCK = 1 << 20
"""Bytes of a file that are read together, of which some elements are taken."""


@dataclass(frozen=True, slots=True)
class StridedRef(MadeRef):
    """A view of a storage whose elements do not lie one after the other: transposed, channels last, expanded."""

    source: TensorRef
    """The stretch of its file from its first element to its last, as one row."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Elements from one index to the next, axis by axis; not negative, 0 where all are the same."""

    why_made = "is not contiguous"

    @property
    def name(self) -> str:
        """The name that its model gives it."""
        return self.source.name

    @property
    def dtype(self) -> str:
        """As stored."""
        return self.source.dtype

    @property
    def scratch_bytes(self) -> int:
        """See `Ref`: a block of the file."""
        return STRIDED_BLOCK + 64
