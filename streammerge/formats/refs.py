"""References to tensors: each answers for itself how it is read, what it needs and what its dtype is.

A new kind is one class: it derives from `MadeRef` (or `Ref`), answers what is asked of it here and registers its reader
with `reads` (`streammerge.formats.readers`). Nothing else knows the kinds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streammerge.dtypes import BITS, itemsize
from streammerge.formats.readers import READERS, SLOT_READERS

if TYPE_CHECKING:
    from streammerge.io.buffer_pool import Bytes
    from streammerge.io.reader import Reader
    from streammerge.io.scratch import Scratch
    from streammerge.timing import Stages

SAMPLE_BYTES = 4096
"""Bytes of a tensor that a fingerprint of its model looks at."""
READ_BLOCK = 1 << 20
"""Elements computed at a time."""


class Ref:
    """A tensor or a companion of one, as a merge reads it."""

    __slots__ = ()
    if TYPE_CHECKING:

        @property
        def name(self) -> str:
            """The name that its model gives it."""

        @property
        def shape(self) -> tuple[int, ...]:
            """The shape that a merge sees."""

        @property
        def dtype(self) -> str:
            """The dtype of the elements once they are read."""

        @property
        def path(self) -> str:
            """For messages: the file of the tensor that it is mainly made of."""

        @property
        def nbytes(self) -> int:
            """Bytes of the elements once they are read."""

    @property
    def n_elements(self) -> int:
        """How many elements the shape has; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def scratch_bytes(self) -> int:
        """Bytes that reading takes in addition to the elements."""
        return 0

    @property
    def chunk_elements(self) -> int:
        """Elements of one compressed chunk; 0 where elements can be read one by one."""
        return 0

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk, decompressed."""
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
        """Read elements into a slot (`streammerge.planning.memory.buffers`); return where in it they begin.

        Parameters
        ----------
        stages
            Takes the time.
        again
            The same elements will be read once more.
        """
        with stages.time("read"):
            if (special := SLOT_READERS.get(type(self))) is not None:
                return special(reader, self, start, stop, slot, scratch, again)
            self.read(reader, start, stop, slot, scratch)
        return 0

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        """Ask the kernel to begin reading what elements `start` to `stop` are made of, where that lies together."""

    def files(self, start: int, stop: int) -> Iterator[str]:
        """Yield the files that elements `start` to `stop` lie in."""
        yield self.path


class SourceRef(Ref):
    """A model's tensor."""

    __slots__ = ()

    @property
    def plain(self) -> TensorRef | None:
        """The tensor itself where a file holds its elements as they are read; else None."""
        return None

    @property
    def stored(self) -> TensorRef:
        """The tensor in a file that it is mainly made of."""
        raise NotImplementedError

    @property
    def stored_dtype(self) -> str:
        """The dtype that the model is stored in, whatever the elements are computed in."""
        return self.dtype

    @property
    def stored_format(self) -> str | None:
        """How its values are stored where they are quantised, as `inspect` shows it; else None."""
        return None

    @property
    def parts(self) -> tuple[SourceRef, ...]:
        """The tensors that it is made of."""
        return ()

    @property
    def kernels(self) -> frozenset[str]:
        """Groups of compiled kernels that reading it makes use of."""
        return frozenset().union(*(part.kernels for part in self.parts))

    @property
    def shown(self) -> Mapping[str, Any]:
        """What `inspect` says of it in addition to where it is stored."""
        return {}

    @property
    def sample(self) -> tuple[int, int]:
        """The elements, from the first to before the last, that a fingerprint of its model looks at."""
        n = min(SAMPLE_BYTES // 8, self.n_elements)
        first = (self.n_elements - n) // 2
        return first, first + n

    @property
    def stages(self) -> frozenset[str]:
        """Names of the stages that compute what it is made of."""
        return frozenset().union(*(part.stages for part in self.parts))

    @property
    def asks(self) -> bool:
        """Whether statistics must be known before it can be read: of a stage that it is made of."""
        return any(part.asks for part in self.parts)

    @property
    def is_whole(self) -> bool:
        """Whether any part of it takes as much work as all of it: then it is read all at once."""
        return any(part.is_whole for part in self.parts)

    @property
    def file_bytes(self) -> int:
        """Bytes that are read from files for all of its elements, as a rule."""
        return self.nbytes

    @property
    def bytes_before(self) -> int:
        """Bytes that are read before its first element can be: for statistics of its own, not for those of its parts."""
        return 0

    @property
    def is_gathered(self) -> bool:
        """Whether its rows are in the order of another vocabulary."""
        return False

    @property
    def is_patched(self) -> bool:
        """Whether an adapter trained single rows of it and left all others."""
        return False

    @property
    def n_blocks(self) -> int:
        """Blocks of other tensors that it is put together from."""
        return 0

    def renamed(self, name: str) -> SourceRef:
        """Return the same tensor under another name."""
        return RenamedRef(self, name)

    def as_stored(self, dtype: str) -> SourceRef:
        """Return what a copy in this dtype is read from: the stored codes where they have it already."""
        return self

    def extents(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """Yield the stretches (tensor in a file, first element, end) that elements `start` to `stop` are made of."""
        return iter(())

    def prefetch(self, reader: Reader, start: int, stop: int) -> None:
        """See `Ref`."""
        for tensor, first, last in self.extents(start, stop):
            tensor.prefetch(reader, first, last)


@dataclass(frozen=True, slots=True)
class TensorRef(SourceRef):
    """Where the bytes of one tensor lie."""

    name: str
    dtype: str
    """The format's own code: a key of `streammerge.dtypes.BITS`."""
    shape: tuple[int, ...]
    path: str
    offset: int
    """Of the first byte, counted from the start of the file."""
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
        """Bytes in the file, which are those of the elements."""
        return self.nbytes

    @property
    def square_sum(self) -> float | None:
        """The recorded sum of squares: none is."""
        return None

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """Return offset and number of the bytes that elements `start` to `stop` have in the file."""
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
        """See `Ref`: past the page cache where that pays."""
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
    """A tensor that is made as it is read; nothing of it is ever written but the merge's own output."""

    __slots__ = ()
    why_made = "lies in no file as it is read"
    """What a message says where only a tensor in a file serves."""
    if TYPE_CHECKING:

        @property
        def source(self) -> SourceRef:
            """The tensor that it is mainly made of."""

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
        """See `SourceRef`: of a quantised tensor those of codes and scales, not of its values."""
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
        """See `Ref`: the file of its source."""
        return self.source.path

    @property
    def nbytes(self) -> int:
        """Bytes of the elements once they are made."""
        return self.n_elements * itemsize(self.dtype)


class AlignedRef(MadeRef):
    """A tensor whose elements lie as those of its source do."""

    __slots__ = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its source."""
        return self.source.shape

    def extents(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """See `SourceRef`."""
        return self.source.extents(start, stop)


class ElementwiseRef(AlignedRef):
    """A tensor each element of which is made from the same element of its source, under the same name."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The name of its source."""
        return self.source.name


@dataclass(frozen=True, eq=False, slots=True)
class RenamedRef(AlignedRef):
    """A tensor that is read as its source is, under a name of its own: a head that was its embedding."""

    source: SourceRef
    name: str

    @property
    def dtype(self) -> str:
        """The dtype of its source."""
        return self.source.dtype

    @property
    def scratch_bytes(self) -> int:
        """See `Ref`: that of its source."""
        return self.source.scratch_bytes

    def read(self, reader: Reader, start: int, stop: int, target: Bytes, scratch: Scratch) -> None:
        """See `Ref`: as its source is read."""
        self.source.read(reader, start, stop, target, scratch)


def middle_of(nbytes: int) -> tuple[int, int]:
    """Return offset and number of the bytes of a tensor in a file that a fingerprint of its model looks at."""
    size = min(SAMPLE_BYTES, nbytes)
    return (nbytes - size) // 2 // 8 * 8, size


def row_elements(shape: Sequence[int]) -> int:
    """Return the elements of one row: of all axes but the first."""
    return math.prod(shape[1:])
