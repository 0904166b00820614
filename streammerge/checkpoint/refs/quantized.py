"""Quantised tensors: codes and scales in files, decoded to fp32 values as they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator

from streammerge.checkpoint.refs.decoded import DecodedRef
from streammerge.dtypes import itemsize
from streammerge.formats.refs import SourceRef, TensorRef
from streammerge.records import dataclass

Three = tuple[int, int, int]
"""One number per axis of a stored tensor viewed as [matrices, rows, columns]."""
SPAN = 1 << 17
"""Number of elements that are decoded together."""
LINES = 1 << 19
"""Bytes of codes, and of scales, that are read together if only a part of each line is needed."""
_FLOAT = 4
_ROOM = 1 << 15
"""Bytes for alignment, and for the part of a direct read that does not fit in the slot."""
ELEMENTS = {"F8_E4M3": 8, "F8_E5M2": 8, "F4_E2M1": 4}
"""Bits of each kind of code; 4-bit codes are stored two per byte, the first in the low half."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """The storage and the meaning of codes; many tensors share one encoding."""

    title: str
    """The format as `inspect` and `plan` show it: ``F8_E4M3, a scale for 128 x 128``."""
    element: str
    """The kind of code: a key of `ELEMENTS`."""
    turned: bool = False
    """Whether the file stores the matrices transposed, as for gpt-oss' experts."""


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of a tensor, one entry per part."""

    tensor: TensorRef
    dtype: str
    """The dtype of the entries; F8_E8M0 even if the file calls them U8."""
    shape: Three
    """Number of entries along each axis."""
    extent: Three
    """Number of elements along each axis that share an entry; the last part of an axis may be shorter."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.tensor.nbytes


@dataclass(frozen=True, slots=True)
class QuantizedRef(DecodedRef):
    """A tensor stored as codes with scales; a value is ``code * scale``, rounded once to fp32."""

    decoders = frozenset({"decoding"})

    name: str
    """The tensor's name in a model that is not quantised."""
    shape: tuple[int, ...]
    source: TensorRef
    """The codes."""
    scales: Scales
    encoding: Encoding

    @property
    def title(self) -> str:
        """The storage format."""
        return self.encoding.title

    @property
    def parts(self) -> tuple[SourceRef, ...]:
        """See `SourceRef`: codes and scales."""
        return self.source, self.scales.tensor

    @property
    def bits(self) -> int:
        """Bits per code."""
        return ELEMENTS[self.encoding.element]

    @property
    def matrices(self) -> Three:
        """The shape of the unpacked stored tensor, viewed as [matrices, rows, columns]."""
        n, rows, columns = as_matrices(self.shape)
        return (n, columns, rows) if self.encoding.turned else (n, rows, columns)

    @property
    def scratch_bytes(self) -> int:
        """Bytes that reading takes in addition to the values: codes, scales (stored and fp32), values to transpose."""
        n = min(self.n_elements, SPAN)
        scales = min(math.prod(self.scales.shape), LINES // _FLOAT)
        codes = min(self.source.nbytes, LINES) + _FLOAT * n if self.encoding.turned else n
        return codes + scales * (itemsize(self.scales.dtype) + _FLOAT) + _ROOM

    def extents(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """See `SourceRef`; a transposed matrix counts as a whole."""
        _, rows, columns = self.matrices
        if self.encoding.turned:
            size = max(1, rows * columns)
            start, stop = start // size * size, -(-stop // size) * size
        each = 8 // self.bits
        yield self.source, start // each, -(-stop // each)


def as_matrices(shape: tuple[int, ...]) -> Three:
    """Return a shape as [matrices, rows, columns]; fewer than three axes give one matrix.

    >>> as_matrices((8, 16)), as_matrices((4, 8, 16)), as_matrices((16,)), as_matrices(())
    ((1, 8, 16), (4, 8, 16), (1, 1, 16), (1, 1, 1))
    """
    if len(shape) > 3:
        return 1, shape[0], math.prod(shape[1:])
    n, rows, columns = (1, 1, 1, *shape)[-3:]
    return n, rows, columns
