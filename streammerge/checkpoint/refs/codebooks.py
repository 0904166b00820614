"""Quantised tensors whose 4-bit codes look up a value: NVFP4 with two scales, and bitsandbytes' blocks."""

from __future__ import annotations

from collections.abc import Iterator

from streammerge.checkpoint.refs.decoded import DecodedRef
from streammerge.formats.refs import SourceRef, TensorRef
from streammerge.records import dataclass

AT_ONCE = 1 << 17
"""Number of elements that are decoded together; even."""
_TEMPORARY = 16
"""Temporary bytes per element during decoding."""
_ROOM = 1 << 16
"""Bytes for tables and alignment."""


class CodebookRef(DecodedRef):
    """A tensor of 4-bit codes, two to a byte."""

    __slots__ = ()

    @property
    def scratch_bytes(self) -> int:
        """Bytes that reading takes in addition to the values: bytes, codes, scales, table positions."""
        return _TEMPORARY * AT_ONCE + _ROOM

    def extents(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """See `SourceRef`: two elements per byte."""
        yield self.stored, start // 2, -(-stop // 2)


@dataclass(frozen=True, slots=True)
class Nvfp4Ref(CodebookRef):
    """E2M1 codes in groups along the columns, F8_E4M3 scales, and one F32 scale for the tensor or per matrix.

    A value is ``code * scale * whole``, or ``code * scale / whole`` if the last scale divides: the exact result rounded
    once.
    """

    name: str
    shape: tuple[int, ...]
    source: TensorRef
    """U8 [..., columns / 2], the even column in the low nibble."""
    scales: TensorRef
    """F8_E4M3 [..., columns / group]."""
    whole: TensorRef
    """F32: one entry, or one per matrix."""
    divides: bool
    group: int
    title: str

    @property
    def parts(self) -> tuple[SourceRef, ...]:
        """See `SourceRef`."""
        return self.source, self.scales, self.whole


@dataclass(frozen=True, slots=True)
class Nested:
    """Block maxima that are themselves codes: ``map[code] * maximum of 256 blocks + offset``, in fp32."""

    absmax: TensorRef
    map: TensorRef
    blocksize: int
    offset: float


@dataclass(frozen=True, slots=True)
class BlocksOf4BitsRef(CodebookRef):
    """bitsandbytes' NF4 and FP4: blocks of consecutive elements, each with its largest magnitude."""

    name: str
    shape: tuple[int, ...]
    source: TensorRef
    """The codes, U8; the first of two elements is in the high nibble."""
    absmax: TensorRef
    """The largest magnitude of each block: F32, or U8 if nested."""
    map: TensorRef
    """F32 [16]: the value of each code."""
    blocksize: int
    title: str
    nested: Nested | None = None

    @property
    def parts(self) -> tuple[SourceRef, ...]:
        """See `SourceRef`."""
        nested = () if self.nested is None else (self.nested.absmax, self.nested.map)
        return self.source, self.absmax, self.map, *nested
