"""Tensors stored in chunks, in one or many files: each process of a training run wrote the chunks it held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streammerge.formats.refs import MadeRef, SourceRef, TensorRef
from streammerge.formats.strided_refs import STRIDED_BLOCK, Box, StridedRef, boxes, row_major
from streammerge.records import dataclass

if TYPE_CHECKING:
    from streammerge.io.buffer_pool import Bytes
    from streammerge.io.reader import Reader
    from streammerge.io.scratch import Scratch
    from streammerge.timing import Stages


@dataclass(frozen=True, eq=False, slots=True)
class Chunk:
    """A box of a tensor's elements, and their positions in a file."""

    begins: tuple[int, ...]
    """The first index on every axis of the tensor."""
    sizes: tuple[int, ...]
    source: TensorRef
    """The range of a file from the first element to the last."""
    strides: tuple[int, ...]
    """Number of elements in `source` from one index to the next, per axis."""
    first: int | None
    """The first element of the tensor in the chunk, if the chunk holds contiguous elements in order; else None."""

    @classmethod
    def of(
        cls,
        begins: tuple[int, ...],
        sizes: tuple[int, ...],
        ref: TensorRef | StridedRef,
        shape: tuple[int, ...],
    ) -> Chunk:
        """Return the chunk formed by a stored tensor, for a tensor of this shape."""
        if isinstance(ref, StridedRef):
            return cls(begins, sizes, ref.source, ref.strides, None)
        return cls(begins, sizes, ref, tuple(row_major(sizes)), _first_in_row(begins, sizes, shape))

    def inside(self, box: Box) -> Box | None:
        """Return the part of a box that is in the chunk, in the chunk's own indexes; None if there is none."""
        part = []
        for (begin, end), origin, size in zip(box, self.begins, self.sizes, strict=True):
            first, last = max(begin - origin, 0), min(end - origin, size)
            if first >= last:
                return None
            part.append((first, last))
        return part


def _first_in_row(begins: Sequence[int], sizes: Sequence[int], shape: Sequence[int]) -> int | None:
    """Return the first element of a box whose elements are contiguous in the tensor; None if they are not."""
    partial = [axis for axis, (size, whole) in enumerate(zip(sizes, shape, strict=True)) if size != whole]
    if partial and any(size != 1 for size in sizes[: partial[-1]]):
        return None
    return sum(begin * step for begin, step in zip(begins, row_major(shape), strict=True))


@dataclass(frozen=True, eq=False, slots=True)
class ShardedRef(MadeRef):
    """A tensor that is assembled from chunks as it is read; the chunks hold every element exactly once."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    """The chunks, sorted by first index."""

    why_made = "is put together from chunks"

    @property
    def source(self) -> SourceRef:
        """The first chunk."""
        return self.chunks[0].source

    @property
    def path(self) -> str:
        """The file of the first chunk, for messages."""
        return self.source.path

    @property
    def parts(self) -> tuple[SourceRef, ...]:
        """See `SourceRef`."""
        return tuple(chunk.source for chunk in self.chunks)

    @property
    def shown(self) -> Mapping[str, Any]:
        """See `SourceRef`: describes all chunks, whereas the rest of the output describes the first chunk only."""
        return {"nbytes": self.nbytes, "chunks": len(self.chunks)}

    def renamed(self, name: str) -> ShardedRef:
        """See `SourceRef`."""
        return replace(self, name=name)

    @property
    def n_blocks(self) -> int:
        """See `SourceRef`."""
        return len(self.chunks)

    @property
    def scratch_bytes(self) -> int:
        """See `Ref`: a block of a file, if a chunk is not contiguous in the tensor."""
        return min(STRIDED_BLOCK, self.widest) + 64

    @property
    def widest(self) -> int:
        """Bytes of the largest file range of a chunk that is not contiguous in the tensor."""
        return max((chunk.source.nbytes for chunk in self.chunks if chunk.first is None), default=0)

    def extents(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """See `SourceRef`."""
        for box in boxes(self.shape, start, stop):
            for chunk in self.chunks:
                if (part := chunk.inside(box)) is not None:
                    pairs = list(zip(part, chunk.strides, strict=True))
                    first = sum(begin * stride for (begin, _), stride in pairs)
                    yield chunk.source, first, 1 + sum((end - 1) * stride for (_, end), stride in pairs)

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
        """See `Ref`: past the page cache if one chunk holds the whole range contiguously."""
        for chunk in self.chunks:
            first = chunk.first
            if first is not None and first <= start and stop <= first + chunk.source.n_elements:
                at = start - first
                return chunk.source.read_slot(
                    reader, at, stop - start + at, slot, scratch, stages, again=again
                )
        with stages.time("read"):
            self.read(reader, start, stop, slot, scratch)
        return 0
