"""Read the inputs of a piece into its buffer."""

from __future__ import annotations

from streammerge.algebra.block import Block, Operand
from streammerge.algebra.extent import Extent
from streammerge.dtypes import BITS
from streammerge.engine.worker import Worker
from streammerge.formats.refs import MadeRef, Ref, TensorRef
from streammerge.io.buffer_pool import Bytes
from streammerge.planning.job import Job
from streammerge.planning.memory.buffers import divide
from streammerge.planning.schedule import Chunk
from streammerge.tensors.read import read_source


def load(
    worker: Worker,
    job: Job,
    start: int,
    stop: int,
    buffer: Bytes,
    *,
    models_too: bool = True,
    again: bool = False,
) -> Block:
    """Read elements `start` to `stop` of every input of a job into the buffer: base, models, Fisher diagonals.

    Without `models_too` only the Fisher diagonals are read, to the same places. `again` announces that the same elements
    will be read once more.
    """
    operands = _read_operands(worker, job, start, stop, buffer, models_too=models_too, again=again)
    fishers = tuple(operands[len(job.inputs) : len(job.inputs) + len(job.fishers)])
    first = int(job.base is not None)
    base, models = (operands[0] if first else None), operands[first : len(job.inputs)]
    extent = worker.plan.work[job.ordinal].extent
    shape: tuple[int, ...] = (stop - start,)
    if extent.is_line:
        line = job.line_length(extent)
        shape = ((stop - start) // line, line)
    elif extent == Extent.TENSOR:
        shape = job.shape
    end = buffer.size - buffer.size % 8
    return Block(
        buffer[:end], tuple(models), base, job.name, start, stop - start, shape, worker.keys, fishers
    )


def _read_operands(
    worker: Worker, job: Job, start: int, stop: int, buffer: Bytes, *, models_too: bool, again: bool
) -> list[Operand]:
    """Read everything that a piece holds, each operand to its place in the buffer; return the operands.

    A stage takes the elements that the piece it is computed for has already read.
    """
    places = divide(job, stop - start, worker.plan.work[job.ordinal].at_once)
    scratch, fishers = buffer[places.scratch :], range(len(job.inputs), len(job.inputs) + len(job.fishers))
    operands = [Operand(slot, ref.dtype) for ref, slot in zip(job.held, places.slots, strict=True)]
    lends = job.has_stages and not worker.is_stage
    try:
        for number, ref in _read_order(job):
            if not models_too and number not in fishers:
                continue
            slot = places.slots[number]
            if worker.is_stage and (known := worker.lent.find(ref, start, stop)) is not None:
                buffer[slot : slot + known.size] = known
                continue
            begins = slot + read_source(
                worker.reader, ref, start, stop, buffer[slot:], scratch, worker.stages, again=again
            )
            operands[number] = Operand(begins, ref.dtype)
            if lends and isinstance(ref, TensorRef):
                nbytes = (stop - start) * BITS[ref.dtype] // 8
                worker.lent.keep(ref, start, stop, buffer[begins : begins + nbytes])
    finally:
        if lends:
            worker.lent.end()
    return operands


def _read_order(job: Job) -> list[tuple[int, Ref]]:
    """Return the references that a piece holds, each with its number; with stages, tensors in files come first."""
    held = list(enumerate(job.held))
    return sorted(held, key=lambda one: isinstance(one[1], MadeRef)) if job.has_stages else held


def prefetch(worker: Worker, chunk: Chunk) -> None:
    """Prefetch the input bytes of a chunk before a worker takes it."""
    for piece in chunk.pieces:
        job = worker.plan.jobs[piece.job]
        for ref in (*job.inputs, *job.fishers) if job.kind == "merge" else job.sources:
            ref.prefetch(worker.reader, piece.start, piece.stop)
