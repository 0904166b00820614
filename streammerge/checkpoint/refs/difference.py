"""Changes of a weight: the difference of two tensors, or a sum of products of low-rank factors."""

from __future__ import annotations

from collections.abc import Iterator

from streammerge.checkpoint.refs.adapted import AdaptedRef
from streammerge.dtypes import itemsize
from streammerge.formats.refs import READ_BLOCK, ElementwiseRef, SourceRef, TensorRef
from streammerge.records import dataclass


@dataclass(frozen=True, eq=False, slots=True)
class DifferenceRef(ElementwiseRef):
    """A tensor minus that of the base, in fp64; both are widened first, so that 16-bit and fp32 weights lose nothing."""

    source: SourceRef
    base: SourceRef

    @property
    def dtype(self) -> str:
        """Always fp64."""
        return "F64"

    @property
    def parts(self) -> tuple[SourceRef, ...]:
        """See `SourceRef`."""
        return self.source, self.base

    @property
    def read_elements(self) -> int:
        """Number of elements read at a time: all of them if that takes as much work as a few."""
        return max(1, self.n_elements if self.is_whole else READ_BLOCK)

    @property
    def scratch_bytes(self) -> int:
        """See `Ref`: a block of one tensor as it is read; what widening it takes is ignored."""
        width = max(itemsize(part.dtype) for part in self.parts)
        block = min(self.read_elements, self.n_elements)
        return block * width + max(part.scratch_bytes for part in self.parts) + (1 << 13)

    @property
    def file_bytes(self) -> int:
        """See `SourceRef`: of both tensors."""
        return sum(part.file_bytes for part in self.parts)

    def extents(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """See `SourceRef`: the same elements of both."""
        for part in self.parts:
            yield from part.extents(start, stop)


@dataclass(frozen=True, eq=False, slots=True)
class SumOfProductsRef(ElementwiseRef):
    """The change that several adapters make together: the sum of ``c s L R`` over them, which is never formed."""

    source: SourceRef
    """The weight that they change; it is not read."""
    terms: tuple[tuple[float, AdaptedRef], ...]
    """The coefficient c of each adapter, and the weight that it is applied to."""

    @property
    def dtype(self) -> str:
        """Always fp64."""
        return "F64"

    @property
    def rank(self) -> int:
        """The sum of the ranks, which bounds the rank of the sum."""
        return sum(adapted.rank for _, adapted in self.terms)

    @property
    def scratch_bytes(self) -> int:
        """See `Ref`: its factors are read into memory of their own."""
        return 0

    @property
    def kernels(self) -> frozenset[str]:
        """See `SourceRef`: products of its factors are taken elsewhere."""
        return frozenset()

    @property
    def file_bytes(self) -> int:
        """See `SourceRef`: of the factors."""
        factors = [factor for _, adapted in self.terms for factor in (adapted.left, adapted.right)]
        return sum(factor.tensor.nbytes for factor in factors if factor is not None)

    def extents(self, start: int, stop: int) -> Iterator[tuple[TensorRef, int, int]]:
        """See `SourceRef`: all factors."""
        for _, adapted in self.terms:
            for factor in (adapted.left, adapted.right):
                if factor is not None:
                    yield factor.tensor, 0, factor.tensor.n_elements
