"""Quantised tensors: codes and scales in files, values of fp32 as they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from streammerge.dtypes import itemsize
from streammerge.formats.refs import MadeRef, SourceRef, TensorRef

Three = tuple[int, int, int]
"""A number for each axis of a stored tensor seen as matrices of rows of columns."""
SPAN = 1 << 17
"""Elements that are decoded together."""
LINES = 1 << 19
"""Bytes of codes, and of scales, that are read together where only a part of each line is wanted."""
_FLOAT = 4
_ROOM = 1 << 15
"""Bytes for alignment, and for what of a direct read does not fit where it is decoded."""
ELEMENTS = {"F8_E4M3": 8, "F8_E5M2": 8, "F4_E2M1": 4}
"""Bits of the kinds of codes; those of four lie two to a byte, the first in the low half."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How codes are stored and what they mean; many tensors share one."""

    title: str
    """What `inspect` and `plan` show: ``F8_E4M3, a scale for 128 x 128``."""
    element: str
    """The kind of the codes: a key of `ELEMENTS`."""
    turned: bool = False
    """Whether rows and columns of a matrix are exchanged in the file: gpt-oss' experts."""


@dataclass(frozen=True, slots=True)
class Scales:
    """A companion with one entry for each part of a tensor."""

    tensor: TensorRef
    dtype: str
    """What its bytes are: F8_E8M0 also where the file calls them U8."""
    shape: Three
    """Entries along each axis."""
    extent: Three
    """Elements along each axis that one entry serves; the last part of an axis may be shorter."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.tensor.nbytes


@dataclass(frozen=True, slots=True)
class QuantizedRef(MadeRef):
    """A tensor that is stored as codes with scales; a value is ``code * scale``, rounded once to fp32."""

    name: str
    """That of the tensor in a model that is not quantised."""
    shape: tuple[int, ...]
    source: TensorRef
    """The codes."""
    scales: Scales
    encoding: Encoding

    @property
    def dtype(self) -> str:
        """Of the values."""
        return "F32"

    @property
    def path(self) -> str:
        """The file of the codes."""
        return self.source.path

    @property
    def stored_dtype(self) -> str:
        """See `SourceRef`: that of the weights which it was quantised from."""
        return "BF16"

    @property
    def stored_format(self) -> str:
        """See `SourceRef`."""
        return self.encoding.title

    @property
    def parts(self) -> tuple[SourceRef, ...]:
        """See `SourceRef`: codes and scales."""
        return self.source, self.scales.tensor

    @property
    def kernels(self) -> frozenset[str]:
        """See `SourceRef`."""
        return frozenset({"decoding"})

    @property
    def shown(self) -> Mapping[str, Any]:
        """See `SourceRef`."""
        return {"stored_as": self.encoding.title}

    @property
    def bits(self) -> int:
        """Of one code."""
        return ELEMENTS[self.encoding.element]

    @property
    def matrices(self) -> Three:
        """The stored tensor, unpacked, as matrices of rows of columns."""
        n, rows, columns = as_matrices(self.shape)
        return (n, columns, rows) if self.encoding.turned else (n, rows, columns)

    @property
    def scratch_bytes(self) -> int:
        """What reading takes in addition to the values: codes, their scales as stored and in fp32, values to be turned."""
        n = min(self.n_elements, SPAN)
        scales = min(math.prod(self.scales.shape), LINES // _FLOAT)
        codes = min(self.source.nbytes, LINES) + _FLOAT * n if self.encoding.turned else n
        return codes + scales * (itemsize(self.scales.dtype) + _FLOAT) + _ROOM

    def extents(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """See `SourceRef`; of a turned matrix the whole of it."""
        _, rows, columns = self.matrices
        if self.encoding.turned:
            size = max(1, rows * columns)
            start, stop = start // size * size, -(-stop // size) * size
        each = 8 // self.bits
        yield self.source, start // each, -(-stop // each)


def as_matrices(shape: tuple[int, ...]) -> Three:
    """Return a shape as matrices of rows of columns: one matrix where there are fewer than three axes.

    >>> as_matrices((8, 16)), as_matrices((4, 8, 16)), as_matrices((16,)), as_matrices(())
    ((1, 8, 16), (4, 8, 16), (1, 1, 16), (1, 1, 1))
    """
    if len(shape) <= 3:
        return (*((1,) * (3 - len(shape))), *shape)  # type: ignore[return-value]
    return 1, shape[0], math.prod(shape[1:])
