"""The unit of planning: one job per output tensor, with its inputs and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from streammerge.algebra.extent import Extent
from streammerge.checkpoint.companions import CompanionRef
from streammerge.dtypes import BITS, FLOATS8
from streammerge.formats.refs import Ref, SourceRef
from streammerge.records import dataclass
from streammerge.statistics.base import MeasuredTensor
from streammerge.tensors.encoders.base import Form, Span, Stored

Kind = Literal["merge", "copy", "agree", "factor"]


@dataclass(frozen=True, slots=True)
class Job:
    """One output tensor, and everything that determines its bytes."""

    ordinal: int
    """Index in the order of the merge, which is the file order of the first input."""
    name: str
    dtype: str
    """The dtype that its elements are rounded to: F32 if an encoder takes them."""
    shape: tuple[int, ...]
    kind: Kind
    """`merge`: apply the method. `copy`: copy sources[0], cast if the dtype differs. `agree`: copy sources[0], an
    integer tensor, and warn if a different source has other bytes. `factor`: store the low-rank factors of sources[0],
    which is the change of a weight."""
    sources: tuple[SourceRef, ...]
    """The models' tensors in configured order."""
    base: SourceRef | None
    parameters: Mapping[str, Any]
    fishers: tuple[CompanionRef, ...] = ()
    """The models' Fisher diagonals, for methods that use them; empty if they lack the tensor."""
    grams: tuple[CompanionRef, ...] = ()
    """The models' Gram matrices of the tensor's inputs, for methods that use them; empty if they lack the tensor."""
    members: tuple[int, ...] = ()
    """Indices of the sources' models in the plan; empty: all, in order."""
    stacks: Mapping[str, int] = field(default_factory=dict)
    """Number of layers of each stack of the output, by its prefix; one mapping for all jobs."""
    shared: tuple[SourceRef, ...] = ()
    """Tensors that several of its stages read; they are held while a piece is read."""
    matrix: tuple[int, int] | None = None
    """The shape of each matrix of it, for a method that merges whole matrices; None: it merges the tensor otherwise."""
    encoder: Form | None = None
    """The form in which the result is stored: codes and scales, or factors; None: its elements as they are."""
    keeps_inputs: bool = False
    """Whether the inputs stay in the buffer, since several outputs are made from them; the output has its own slot."""
    outputs_at_once: int = 1
    """Number of outputs that are computed at a time, since they differ only in the scale of the same sum; each has a slot."""

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The tensors that are written, in the order of slots and checksums; usually only the tensor itself."""
        if self.encoder is not None:
            return self.encoder.parts
        return (Stored(self.name, self.dtype, self.shape),)

    def spans(self, start: int, stop: int) -> tuple[Span, ...]:
        """Return the bytes of each part that elements `start` to `stop` are stored in."""
        if self.encoder is not None:
            return self.encoder.spans(start, stop)
        bits = BITS[self.dtype]
        return ((start * bits // 8, stop * bits // 8),)

    @property
    def unit(self) -> int:
        """Elements between two places where its storage allows a cut."""
        return 1 if self.encoder is None else self.encoder.unit

    @property
    def is_copied(self) -> bool:
        """Whether the bytes of its tensor are copied as they are."""
        return self.kind != "merge" and self.encoder is None and self.dtype == self.sources[0].dtype

    @property
    def computed_dtype(self) -> str:
        """The dtype in which the elements are computed: the output's, or fp32 for FP8."""
        return "F32" if self.dtype in FLOATS8 and self.dtype != self.sources[0].dtype else self.dtype

    @property
    def n_elements(self) -> int:
        """Number of elements of the tensor."""
        return self.sources[0].n_elements

    @property
    def n_models(self) -> int:
        """Number of models without the base."""
        return len(self.sources)

    @property
    def row_length(self) -> int:
        """Number of elements of a row (the last axis); 1 for a scalar."""
        return max(1, self.shape[-1]) if self.shape else 1

    def line_length(self, extent: Extent) -> int:
        """Return the number of elements of a line: a row or, for columns, a slice along the first axis."""
        if extent == Extent.COLUMN:
            return max(1, self.n_elements // max(1, self.shape[0])) if self.shape else 1
        return self.row_length

    @property
    def matrix_elements(self) -> int:
        """Number of elements of each matrix, which no cut divides; 0 if it is not merged as matrices."""
        return 0 if self.matrix is None else self.matrix[0] * self.matrix[1]

    @property
    def inputs(self) -> tuple[SourceRef, ...]:
        """Every tensor that is read: the base, if any, then the models."""
        return (*((self.base,) if self.base is not None else ()), *self.sources)

    @property
    def input_bytes(self) -> int:
        """Bytes read by one pass over the models."""
        shared = sum(ref.file_bytes for ref in self.shared)
        return sum(ref.file_bytes for ref in self.inputs) - shared

    @property
    def held(self) -> tuple[Ref, ...]:
        """Everything that a piece holds: the inputs, the Fisher diagonals, and the tensors that several stages read."""
        return (*self.inputs, *self.fishers, *self.shared)

    @property
    def has_stages(self) -> bool:
        """Whether one of its inputs is computed by a stage."""
        return any(ref.stages for ref in self.inputs)

    @property
    def waits(self) -> bool:
        """Whether statistics of its stages must be known before a piece of it is read."""
        return any(ref.asks for ref in self.inputs)

    @property
    def fisher_bytes(self) -> int:
        """Bytes read by one pass over the Fisher diagonals, in their stored, compressed form."""
        return sum(r.stored_nbytes for r in self.fishers)

    @property
    def fisher_chunk_bytes(self) -> int:
        """Size of the largest chunk of the Fisher stores, decompressed, in bytes; 0 without a store."""
        return max((ref.chunk_bytes for ref in self.fishers), default=0)

    @property
    def operator_bytes(self) -> int:
        """Upper bound of the bytes needed to compute the operators from Gram matrices, and to hold them."""
        return 8 * (len(self.grams) + 5) * self.row_length**2 if self.grams else 0

    @property
    def output_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)


def measured(job: Job) -> MeasuredTensor:
    """Return the description of a job's tensor that statistics receive."""
    sums = tuple(ref.square_sum for ref in job.fishers)
    return MeasuredTensor(job.ordinal, job.n_elements, job.name, job.line_length(Extent.COLUMN), sums)
