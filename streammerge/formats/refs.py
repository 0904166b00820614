"""References to tensors. A reference knows how it is read, what reading needs, and its dtype.

A new kind is one class. It derives from `MadeRef` (or `Ref`), implements the members declared here, and registers its
reader with `reads` (`streammerge.formats.readers`). No other code depends on the kinds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streammerge.dtypes import BITS, itemsize
from streammerge.formats.readers import READERS, SLOT_READERS
from streammerge.records import dataclass

if TYPE_CHECKING:
    from streammerge.io.buffer_pool import Bytes
    from streammerge.io.reader import Reader
    from streammerge.io.scratch import Scratch
    from streammerge.timing import Stages

SAMPLE_BYTES = 4096
"""Bytes of a tensor that its model's fingerprint samples."""
READ_BLOCK = 1 << 20
"""Number of elements computed at a time."""


class Ref:
    """A tensor, or a companion of a tensor, as a merge reads it."""

    __slots__ = ()
    if TYPE_CHECKING:

        @property
        def name(self) -> str:
            """The name in the model."""

        @property
        def shape(self) -> tuple[int, ...]:
            """The shape in the merge."""

        @property
        def dtype(self) -> str:
            """The dtype of the elements after reading."""

        @property
        def path(self) -> str:
            """The file of the main source, for messages."""

        @property
        def nbytes(self) -> int:
            """Bytes of the elements after reading."""

    @property
    def n_elements(self) -> int:
        """The number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def scratch_bytes(self) -> int:
        """Bytes that reading takes in addition to the elements."""
        return 0

    @property
    def chunk_elements(self) -> int:
        """Elements per compressed chunk; 0 if elements can be read individually."""
        return 0

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one decompressed chunk."""
        return self.chunk_elements * itemsize(self.dtype)

    def read(self, reader: Reader, start: int, stop: int, target: Bytes, scratch: Scratch) -> None:
        """Read elements `start` to `stop` to the beginning of `target`.

        Raises
        ------
        WorldError
            If a file ends early or the device fails.
        """
        READERS[type(self)](reader, self, start, stop, target, scratch)

    def read_slot(
        self,
        reader: Reader,
        start: int,
        stop: int,
        slot: Bytes,
        scratch: Scratch,
        stages: Stages,
        *,
        again: bool = False,
    ) -> int:
        """Read elements into a slot (`streammerge.planning.memory.buffers`); return the offset at which they begin.

        Parameters
        ----------
        stages
            Records the time taken.
        again
            Whether the same elements will be read again.
        """
        with stages.time("read"):
            if (special := SLOT_READERS.get(type(self))) is not None:
                return special(reader, self, start, stop, slot, scratch, again)
            self.read(reader, start, stop, slot, scratch)
        return 0

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        """Ask the kernel to begin reading the sources of elements `start` to `stop`, where they are contiguous."""

    def files(self, start: int, stop: int) -> Iterator[str]:
        """Yield the files that hold elements `start` to `stop`."""
        yield self.path


class SourceRef(Ref):
    """A model's tensor."""

    __slots__ = ()

    @property
    def plain(self) -> TensorRef | None:
        """The tensor itself if a file holds its elements unchanged; else None."""
        return None

    @property
    def stored(self) -> TensorRef:
        """The stored tensor that is its main source."""
        raise NotImplementedError

    @property
    def stored_dtype(self) -> str:
        """The dtype in which the model is stored, which may differ from that of the computed elements."""
        return self.dtype

    @property
    def stored_format(self) -> str | None:
        """The storage format of quantised values, as `inspect` shows it; None if not quantised."""
        return None

    @property
    def parts(self) -> tuple[SourceRef, ...]:
        """The tensors from which it is made."""
        return ()

    @property
    def kernels(self) -> frozenset[str]:
        """Groups of compiled kernels that reading uses."""
        return frozenset().union(*(part.kernels for part in self.parts))

    @property
    def shown(self) -> Mapping[str, Any]:
        """Information that `inspect` shows in addition to the storage position."""
        return {}

    @property
    def sample(self) -> tuple[int, int]:
        """The range of elements (first, end) that its model's fingerprint samples."""
        n = min(SAMPLE_BYTES // 8, self.n_elements)
        first = (self.n_elements - n) // 2
        return first, first + n

    @property
    def stages(self) -> frozenset[str]:
        """Names of the stages that compute its parts."""
        return frozenset().union(*(part.stages for part in self.parts))

    @property
    def asks(self) -> bool:
        """Whether a stage among its parts needs statistics before the tensor can be read."""
        return any(part.asks for part in self.parts)

    @property
    def is_whole(self) -> bool:
        """Whether reading any range takes as much work as reading the whole tensor, so that it is read at once."""
        return any(part.is_whole for part in self.parts)

    @property
    def file_bytes(self) -> int:
        """Bytes that are usually read from files for all elements."""
        return self.nbytes

    @property
    def bytes_before(self) -> int:
        """Bytes to read before the first element: for the tensor's own statistics, not for those of its parts."""
        return 0

    @property
    def is_gathered(self) -> bool:
        """Whether its rows are in the order of a different vocabulary."""
        return False

    @property
    def is_patched(self) -> bool:
        """Whether an adapter trained single rows and left the others unchanged."""
        return False

    @property
    def is_delta(self) -> bool:
        """Whether its elements are differences from the base, in place of weights."""
        return False

    def delta_from(self, base: SourceRef) -> SourceRef | None:
        """Return its difference from a base as a tensor, if that is known more exactly than by subtraction; else None."""
        return None

    @property
    def n_blocks(self) -> int:
        """The number of blocks of other tensors from which it is assembled."""
        return 0

    def renamed(self, name: str) -> SourceRef:
        """Return the same tensor under the given name."""
        return RenamedRef(self, name)

    def as_stored(self, dtype: str) -> SourceRef:
        """Return the source of a copy in this dtype: the stored codes if they already have the dtype."""
        return self

    def extents(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """Yield the ranges (stored tensor, first element, end) from which elements `start` to `stop` are made."""
        return iter(())

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        """See `Ref`."""
        for tensor, first, last in self.extents(start, stop):
            tensor.prefetch(reader, first, last)


@dataclass(frozen=True, slots=True)
class TensorRef(SourceRef):
    """A tensor stored contiguously in a file."""

    name: str
    dtype: str
    """The format's dtype code: a key of `streammerge.dtypes.BITS`."""
    shape: tuple[int, ...]
    path: str
    offset: int
    """Offset of the first byte from the start of the file."""
    nbytes: int

    @property
    def plain(self) -> TensorRef:
        """Itself."""
        return self

    @property
    def stored(self) -> TensorRef:
        """Itself."""
        return self

    @property
    def stored_nbytes(self) -> int:
        """Bytes in the file, which equal the bytes of the elements."""
        return self.nbytes

    @property
    def square_sum(self) -> float | None:
        """The recorded sum of squares; always None."""
        return None

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Return the offset in the file and the number of bytes of elements `start` to `stop`."""
        first, last = (element * BITS[self.dtype] // 8 for element in (start, stop))
        return self.offset + first, last - first

    def read(self, reader: Reader, start: int, stop: int, target: Bytes, scratch: Scratch) -> None:
        """See `Ref`: through the page cache."""
        offset, nbytes = self.span(start, stop)
        reader.read_into(self.path, offset, target[:nbytes])

    def read_slot(
        self,
        reader: Reader,
        start: int,
        stop: int,
        slot: Bytes,
        scratch: Scratch,
        stages: Stages,
        *,
        again: bool = False,
    ) -> int:
        """See `Ref`: past the page cache if that is faster."""
        with stages.time("read"):
            return reader.read_slot(self.path, *self.span(start, stop), slot, again=again)

    def renamed(self, name: str) -> TensorRef:
        """See `SourceRef`."""
        return replace(self, name=name)

    def extents(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """See `SourceRef`: itself."""
        yield self, start, stop

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        """See `Ref`."""
        reader.prefetch(self.path, *self.span(start, stop))


class MadeRef(SourceRef):
    """A tensor that is computed as it is read; it is never written to an intermediate file."""

    __slots__ = ()
    why_made = "lies in no file as it is read"
    """The reason in messages if only a stored tensor is acceptable."""
    if TYPE_CHECKING:

        @property
        def source(self) -> SourceRef:
            """The main source."""

    @property
    def stored(self) -> TensorRef:
        """See `SourceRef`."""
        return self.source.stored

    @property
    def stored_dtype(self) -> str:
        """See `SourceRef`."""
        return self.source.stored_dtype

    @property
    def stored_format(self) -> str | None:
        """See `SourceRef`."""
        return self.source.stored_format

    @property
    def file_bytes(self) -> int:
        """See `SourceRef`: for a quantised tensor the bytes of codes and scales, not of the values."""
        if self.stored_format is None:
            return self.nbytes
        if self.source.plain is not None:  # the codes themselves
            return sum(part.nbytes for part in self.parts)
        return self.nbytes * self.source.file_bytes // max(1, self.source.nbytes)

    @property
    def parts(self) -> tuple[SourceRef, ...]:
        """See `SourceRef`."""
        return (self.source,)

    @property
    def path(self) -> str:
        """See `Ref`: the file of the source."""
        return self.source.path

    @property
    def nbytes(self) -> int:
        """Bytes of the computed elements."""
        return self.n_elements * itemsize(self.dtype)


class AlignedRef(MadeRef):
    """A tensor whose elements have the same positions as those of its source."""

    __slots__ = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its source."""
        return self.source.shape

    def extents(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """See `SourceRef`."""
        return self.source.extents(start, stop)


class ElementwiseRef(AlignedRef):
    """A tensor with the name of its source; each element is computed from the same element of the source."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The name of its source."""
        return self.source.name


@dataclass(frozen=True, eq=False, slots=True)
class RenamedRef(AlignedRef):
    """A tensor with the values of its source under a different name, such as a head that was tied to its embedding."""

    source: SourceRef
    name: str

    @property
    def dtype(self) -> str:
        """The dtype of its source."""
        return self.source.dtype

    @property
    def scratch_bytes(self) -> int:
        """See `Ref`: the scratch bytes of its source."""
        return self.source.scratch_bytes

    def delta_from(self, base: SourceRef) -> SourceRef | None:
        """See `SourceRef`: the difference of its source."""
        return self.source.delta_from(base)

    def read(self, reader: Reader, start: int, stop: int, target: Bytes, scratch: Scratch) -> None:
        """See `Ref`: reads its source."""
        self.source.read(reader, start, stop, target, scratch)


def middle_of(nbytes: int) -> tuple[int, int]:
    """Return offset and number of the bytes of a stored tensor that its model's fingerprint samples."""
    size = min(SAMPLE_BYTES, nbytes)
    return (nbytes - size) // 2 // 8 * 8, size


def row_elements(shape: Sequence[int]) -> int:
    """Return the number of elements per row: the product of all axes except the first."""
    return math.prod(shape[1:])
