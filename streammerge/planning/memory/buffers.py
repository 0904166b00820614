"""Lay out the operands of a piece in its buffer.

Direct I/O moves whole pages, and data keep their offset within the page. So every operand's slot is one page larger than
its bytes in whole pages. A page precedes the first slot, in which the output, laid over that operand, may begin earlier::

    | page | input 0       | input 1       | ... | output, if wider | scratch ...
             over which the output is laid

Tensors too small for direct I/O follow each other, aligned to cache lines.
"""

from __future__ import annotations

from streammerge.dtypes import BITS, itemsize
from streammerge.io.pages import DIRECT_BYTES, LINE, PAGE, slot_bytes
from streammerge.planning.job import Job
from streammerge.records import dataclass
from streammerge.tensors.encoders.base import Form


@dataclass(frozen=True)
class Places:
    """Offsets into the buffer of a piece, in bytes."""

    slots: tuple[int, ...]
    """Offsets of the inputs: the base, the models, their Fisher diagonals, the tensors that several stages read."""
    output: int | None
    """Offset of the output's own slot; None if the output is laid over the first input."""
    parts: tuple[int, ...]
    """Offsets of the parts that an encoder stores the output as; empty without an encoder."""
    scratch: int
    """Offset of the first free byte."""
    paged: bool
    """Whether direct I/O may use the buffer; all offsets are then multiples of `PAGE`."""
    more: tuple[int, ...] = ()
    """Offsets of the slots of further outputs that are computed at the same time."""

    def output_at(self, first_input: int, file_offset: int) -> int:
        """Return the output's offset in the buffer, with the same offset within its page as in the file.

        If it overlays the first input, whose data begin at `first_input`, it begins no later than they do, since kernels
        read a block before they write it, in ascending order.
        """
        if not self.paged:
            return first_input if self.output is None else self.output
        if self.output is not None:
            return self.output + file_offset % PAGE
        return first_input - (first_input - file_offset) % PAGE

    def part_at(self, part: int, file_offset: int) -> int:
        """Return an offset for a part of an encoded output, with the same offset within its page as in the file."""
        return self.parts[part] + (file_offset % PAGE if self.paged else 0)


def divide(job: Job, n: int, at_once: int | None = None) -> Places:
    """Divide the buffer of a piece of `n` elements; `at_once` are merged at a time, then encoded (default: all)."""
    paged = _is_paged(job)
    slots = []
    position = PAGE if paged else 0
    for bits in _input_bits(job):
        slots.append(position)
        position += slot_bytes(-(-n * bits // 8), paged)
    output = None
    more = []
    if _has_own_slot(job):
        output = position
        position += slot_bytes(min(n, at_once or n) * itemsize(job.computed_dtype), paged)
    for _ in range(job.outputs_at_once - 1):
        more.append(position)
        position += slot_bytes(n * itemsize(job.computed_dtype), paged)
    parts = []
    for nbytes in () if job.encoder is None else job.encoder.room(n):
        parts.append(position)
        position += slot_bytes(nbytes, paged)
    scratch = -(-position // PAGE) * PAGE if job.fisher_chunk_bytes else position
    return Places(tuple(slots), output, tuple(parts), scratch, paged, tuple(more))


def bytes_per_element(job: Job) -> float:
    """Return the buffer bytes per element: of all inputs, and of the outputs that have slots."""
    output = BITS[job.computed_dtype] / 8 * job.outputs_at_once if _has_own_slot(job) else 0.0
    if job.encoder is not None:
        output += sum(job.encoder.unit_nbytes) / job.encoder.unit
    return sum(_input_bits(job)) / 8 + output


def alignment_bytes(job: Job) -> int:
    """Return an upper bound of the bytes that `divide` needs in addition to `bytes_per_element`."""
    slots = len(_input_bits(job)) + job.outputs_at_once
    scratch = PAGE if job.fisher_chunk_bytes else 0
    if job.encoder is not None:
        slots += len(job.parts)
        scratch += _beyond_units(job, job.encoder)
    return ((2 * slots + 1) * PAGE if _is_paged(job) else (slots + 1) * LINE) + scratch


def _beyond_units(job: Job, encoder: Form) -> int:
    """Return the bytes of parts not proportional to the elements: of a last, shorter unit, and of the whole tensor."""
    cut_short = job.n_elements % encoder.unit != 0
    return sum(
        min(part.nbytes, per if cut_short else 0) if per else part.nbytes
        for part, per in zip(encoder.parts, encoder.unit_nbytes, strict=True)
    )


def _input_bits(job: Job) -> tuple[int, ...]:
    """Return the bits per element of all inputs held at once; copies are compared two at a time."""
    if job.is_copied:
        return (BITS[job.dtype],) * min(2, len(job.sources))
    return tuple(BITS[ref.dtype] for ref in job.held)


def _is_paged(job: Job) -> bool:
    return any(job.n_elements * bits // 8 >= DIRECT_BYTES for bits in (*_input_bits(job), BITS[job.dtype]))


def _has_own_slot(job: Job) -> bool:
    """Return whether the output needs its own slot."""
    return not job.is_copied and (
        job.encoder is not None
        or job.keeps_inputs
        or job.computed_dtype != job.dtype
        or BITS[job.dtype] > BITS[job.inputs[0].dtype]
    )
