"""One chunk, from input bytes to written and checksummed output: the only place where they all meet."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from streammerge.algebra.block import Applied, Block, BlockMath, Operand
from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import Rule, WeightedSum
from streammerge.checkpoint.refs.made import SourceRef
from streammerge.dtypes import BITS, itemsize
from streammerge.engine.mixer_cache import MixerCache
from streammerge.engine.nonfinite import bad_fisher, trace
from streammerge.errors import ModelError
from streammerge.formats.zarr_chunks import read_stored
from streammerge.formats.zarr_store import ChunkedRef
from streammerge.io.buffer_pool import Bytes
from streammerge.io.pages import DIRECT_BYTES
from streammerge.io.reader import Reader
from streammerge.numerics.crc32 import crc32
from streammerge.numerics.finite import tally
from streammerge.numerics.philox import RandomKeys
from streammerge.output.journal import Receipt
from streammerge.output.shards import Sink
from streammerge.planning.job import Job
from streammerge.planning.memory.buffers import divide, is_copied
from streammerge.planning.needs import tensor_context_of
from streammerge.planning.plan import MergePlan
from streammerge.planning.schedule import Chunk, Piece
from streammerge.statistics.kinds import Answer, Mixing, Statistic, partials_of
from streammerge.statistics.reducers import (
    NotFiniteError,
    Range,
    Reducer,
    TopKReducer,
    collect,
    make_reducer,
)
from streammerge.tensors.float8 import narrow
from streammerge.tensors.read import prefetch_source, read_source
from streammerge.timing import Stages

Answers = list[list[Answer]]
_SAMPLE_ABOVE = 1 << 19
"""Elements; below, one full pass costs no more than sampling."""
_SAMPLE_BLOCKS = 64
_SAMPLE_BYTES = 1 << 22
"""Of a sample, at most: of many models together it has fewer blocks."""
_COUNTED_AT_ONCE = 1 << 30
"""Elements; a piece counts in 32 bits."""


@dataclass
class Context:
    """What the chunks of one merge share. Everything in it may be used from many threads."""

    plan: MergePlan
    reader: Reader
    writer: Sink
    keys: RandomKeys
    stop: threading.Event
    answers: dict[int, Answers] = field(default_factory=dict)
    """Answers already known of each job: whole-model and streamed statistics."""
    differing: set[int] = field(default_factory=set)
    """Integer tensors that the models do not agree on."""
    stages: Stages = field(default_factory=Stages)
    mixers: MixerCache = field(default_factory=MixerCache)
    """The matrices of a method that takes Gram matrices, of one tensor at a time."""
    tolerant: bool = False
    """Whether a value that is not finite is written and reported, not refused."""


def run_chunk(context: Context, chunk: Chunk, arena: Bytes) -> list[Receipt]:
    """Read, merge, write and checksum the pieces of a chunk; safe to run twice.

    Returns the receipts of the pieces finished: all of them, unless `context.stop` was set.

    Raises
    ------
    ModelError
        If a value is not finite; WorldError if reading or writing fails.
    """
    receipts = []
    for piece in chunk.pieces:
        if context.stop.is_set():
            break
        job = context.plan.jobs[piece.job]
        run = _copy_piece if is_copied(job) else _merge_piece
        receipts.append(run(context, job, piece, arena))
        if piece.stop - piece.start == job.n_elements:
            context.answers.pop(job.ordinal, None)  # thousands of tensors may share a chunk
    return receipts


def _merge_piece(context: Context, job: Job, piece: Piece, arena: Bytes) -> Receipt:
    loaded = load(context, job, piece.start, piece.stop, arena)
    try:
        with math_for(context, job, loaded) as math:
            with context.stages.time("statistics"):
                rule = resolve_in_memory(context, job, loaded, math, until_model=False)
            assert not isinstance(rule, list)
            out = _place_output(context, job, piece, loaded)
            with context.stages.time("compute"):
                applied = math.apply(rule, out)
    except NotFiniteError:
        raise not_finite(context, job, piece.start, piece.stop) from None
    data = arena[out.offset : out.offset + loaded.n * itemsize(out.dtype)]
    narrowed = clipped = 0
    if out.dtype != job.dtype:
        with context.stages.time("compute"):
            narrowed, clipped = narrow(data.view(np.float32), job.dtype, data)
        data = data[: loaded.n]
    if (applied.not_finite or clipped) and not context.tolerant:
        raise not_finite(context, job, piece.start, piece.stop, data)
    if applied.not_finite and (error := bad_fisher(context.reader, job, piece.start, piece.stop)) is not None:
        raise error
    if out.dtype != job.dtype:
        applied = replace(applied, not_finite=narrowed)
    return _emit(context, job, piece, data, applied)


def _copy_piece(context: Context, job: Job, piece: Piece, arena: Bytes) -> Receipt:
    first, last = (e * BITS[job.dtype] // 8 for e in (piece.start, piece.stop))
    places = divide(job, piece.stop - piece.start)

    def read(ref: SourceRef, slot: int) -> tuple[int, Bytes]:
        with context.stages.time("read"):
            begins = slot + read_source(
                context.reader, ref, piece.start, piece.stop, arena[slot:], arena[places.scratch :]
            )
        return begins, arena[begins : begins + last - first]

    source, *others = job.sources
    begins, data = read(source, places.slots[0])
    for ref in others:
        if not np.array_equal(data, read(ref, places.slots[1])[1]):
            context.differing.add(job.ordinal)
    target = places.output_at(begins, _file_offset(context, job, piece))
    if target != begins and data.size >= DIRECT_BYTES:
        moved = arena[target : target + data.size]
        ctypes.memmove(moved.ctypes.data, data.ctypes.data, data.size)  # numpy would copy twice: they overlap
        data = moved
    with context.stages.time("compute"):
        bad = tally(data, job.dtype).count
    return _emit(context, job, piece, data, Applied(bad, ()))


def _file_offset(context: Context, job: Job, piece: Piece) -> int:
    return context.plan.layout.slots[job.ordinal].offset + piece.start * BITS[job.dtype] // 8


def _emit(context: Context, job: Job, piece: Piece, data: Bytes, applied: Applied) -> Receipt:
    shard = context.plan.layout.slots[job.ordinal].shard
    with context.stages.time("write"):
        context.writer.write(shard, _file_offset(context, job, piece), data)
    with context.stages.time("checksum"):
        checksum = crc32(data)
    return Receipt(
        job.ordinal, piece.start, piece.stop, checksum, applied.kept, applied.floored, applied.not_finite
    )


def load(
    context: Context,
    job: Job,
    start: int,
    stop: int,
    arena: Bytes,
    *,
    models_too: bool = True,
    again: bool = False,
) -> Block:
    """Read elements `start` to `stop` of every input of a job into the arena: base, models, diagonals.

    Without `models_too` the Fisher diagonals alone are read, to the same places. `again` says that the same
    elements will be read once more.
    """
    operands = []
    places = divide(job, stop - start)
    refs: tuple[SourceRef | ChunkedRef, ...] = (*job.inputs, *job.fishers)
    for number, (ref, slot) in enumerate(zip(refs, places.slots, strict=True)):
        width = itemsize(ref.dtype)
        size = (stop - start) * width
        position = slot
        if isinstance(ref, ChunkedRef):
            target, scratch = arena[slot : slot + size], arena[places.scratch :]
            read_stored(context.reader, context.stages, ref, start, stop, target, scratch)
        elif models_too or number >= len(job.inputs):
            with context.stages.time("read"):
                position += read_source(
                    context.reader, ref, start, stop, arena[slot:], arena[places.scratch :], again=again
                )
        operands.append(Operand(position, ref.dtype))
    fishers = tuple(operands[len(job.inputs) :])
    first = int(job.base is not None)
    base, models = (operands[0] if first else None), operands[first : len(job.inputs)]
    extent = context.plan.work[job.ordinal].extent
    shape: tuple[int, ...] = (stop - start,)
    if extent.is_line:
        line = job.line_length(extent)
        shape = ((stop - start) // line, line)
    elif extent == Extent.TENSOR:
        shape = job.shape
    end = arena.size - arena.size % 8
    return Block(
        arena[:end], tuple(models), base, job.name, start, stop - start, shape, context.keys, fishers
    )


def prefetch(context: Context, chunk: Chunk) -> None:
    """Ask for the input bytes of a chunk before a worker takes it up, so that it finds them in memory."""
    for piece in chunk.pieces:
        job = context.plan.jobs[piece.job]
        for ref in (*job.inputs, *job.fishers) if job.kind == "merge" else job.sources:
            if isinstance(ref, ChunkedRef):
                for path, _, _ in ref.chunks(piece.start, piece.stop):
                    context.reader.prefetch_file(path)
            else:
                prefetch_source(context.reader, ref, piece.start, piece.stop)


def _place_output(context: Context, job: Job, piece: Piece, loaded: Block) -> Operand:
    """Lay the output over the first input where its elements are not wider, else behind all inputs."""
    first = loaded.base or loaded.models[0]
    if (
        job.computed_dtype != job.dtype
    ):  # Rounded in its own slot, which is not where it would lie for direct I/O.
        own = divide(job, loaded.n).output
        assert own is not None
        return Operand(own, job.computed_dtype)
    offset = divide(job, loaded.n).output_at(first.offset, _file_offset(context, job, piece))
    return Operand(offset, job.dtype)


@contextmanager
def math_for(context: Context, job: Job, loaded: Block) -> Iterator[BlockMath]:
    """Lend the arithmetic of a block, once it is this thread's turn on the device."""
    turn = context.plan.backend_of(job).turn
    with ExitStack() as held:
        if turn is not None:
            with context.stages.time("wait for the GPU"):
                held.enter_context(turn(context.plan.device))
        yield _math_of(context, job, loaded)


def _math_of(context: Context, job: Job, loaded: Block) -> BlockMath:
    """Return the arithmetic of a block, by the backend of its job."""
    plan = context.plan
    return plan.backend_of(job).math(loaded, plan.device, plan.work[job.ordinal].extent)


def follow(context: Context, job: Job) -> Rule | list[Statistic]:
    """Return a job's rule, or the statistics it has after the answers known so far."""
    if job.kind != "merge":
        return WeightedSum((1.0,))
    answers = context.answers.get(job.ordinal, [])
    wanted = context.plan.method.start(tensor_context_of(job), job.parameters, answers)
    if isinstance(wanted, list) and isinstance(wanted[0], Mixing):
        mixers = context.mixers.get(job, wanted[0], context.reader, context.stages)
        return context.plan.method.start(tensor_context_of(job), job.parameters, [*answers, [mixers]])
    return wanted


def resolve_in_memory(
    context: Context, job: Job, loaded: Block, math: BlockMath, *, until_model: bool
) -> Rule | list[Statistic]:
    """Answer a job's tensor-scope statistics from the tensor in memory.

    Returns its rule or, with `until_model`, the whole-model statistics it stops at.
    """
    while isinstance(wanted := follow(context, job), list):
        if wanted[0].extent == Extent.MODEL:
            assert until_model, "whole-model statistics come before the merge"
            return wanted
        # One after the other: the tensor lies in memory, and of many models each has counts of its own.
        known = [_answer_in_memory(context, job, loaded, math, statistic) for statistic in wanted]
        context.answers.setdefault(job.ordinal, []).append(known)
    return wanted


def _answer_in_memory(
    context: Context, job: Job, loaded: Block, math: BlockMath, statistic: Statistic
) -> Answer:
    """Answer one statistic from the tensor in memory."""
    room, row = context.plan.statistics_memory, context.plan.work[job.ordinal].row
    most = room.elements if partials_of(statistic) else _COUNTED_AT_ONCE
    step = max(row, most // row * row)

    def run_pass(some: Sequence[Reducer], only: Range | None) -> None:
        first, last = (0, loaded.n) if only is None else (only[1], min(only[2], loaded.n))
        for start in range(first, last, step):
            stop = min(last, start + step)
            whole = stop - start == loaded.n
            part = loaded if whole else slice_of(loaded, start, stop)
            its_math = math if whole else _math_of(context, job, part)
            for reducer in some:
                reducer.add(job.ordinal, part.start, part.n, its_math)

    def run_sample(some: Sequence[TopKReducer]) -> None:
        for reducer in some:
            part = sample_of(loaded, reducer.model)
            reducer.add(job.ordinal, 0, part.n, _math_of(context, job, part))

    reducer = make_reducer(
        statistic, [job], {job.ordinal: statistic}, context.keys, context.tolerant, room.bins
    )
    return collect([reducer], run_pass, run_sample if loaded.n > _SAMPLE_ABOVE else None)[0]


def slice_of(loaded: Block, start: int, stop: int) -> Block:
    """Return elements `start` to `stop` of a loaded piece as a piece of its own, without copying."""

    def moved(operand: Operand) -> Operand:
        return replace(operand, offset=operand.offset + start * itemsize(operand.dtype))

    line = loaded.row_length if len(loaded.shape) == 2 else 0
    shape = ((stop - start) // line, line) if line else (stop - start,)
    return replace(
        loaded,
        start=loaded.start + start,
        n=stop - start,
        shape=shape,
        models=tuple(moved(operand) for operand in loaded.models),
        base=None if loaded.base is None else moved(loaded.base),
        fishers=tuple(moved(operand) for operand in loaded.fishers),
    )


def sample_of(loaded: Block, model: int | None) -> Block:
    """Return a copy of blocks of 4096 elements spread over a piece, one after the other.

    Random masks are drawn as if it began the tensor, which for a sample is as good. Where one `model` alone is
    looked at, the others are not copied: they seem to lie where the first operand does.
    """
    operands = (*(() if loaded.base is None else (loaded.base,)), *loaded.models)
    first = len(operands) - len(loaded.models)
    copied = [i for i in range(len(operands)) if i < first or model is None or i - first == model]
    fitting = _SAMPLE_BYTES // (4096 * sum(itemsize(operands[i].dtype) for i in copied))
    blocks = max(1, min(_SAMPLE_BLOCKS, max(16, loaded.n >> 16), fitting))
    stride = loaded.n // blocks // 4096 * 4096
    parts = []
    copies = []
    position = 0
    for i, operand in enumerate(operands):
        if i not in copied:
            copies.append(Operand(0, operands[copied[0]].dtype))
            continue
        width = itemsize(operand.dtype)
        spread = loaded.arena[operand.offset : operand.offset + blocks * stride * width]
        parts.append(spread.reshape(blocks, stride * width)[:, : 4096 * width].ravel())
        copies.append(Operand(position, operand.dtype))
        position += parts[-1].size
    n = blocks * 4096
    return replace(
        loaded,
        arena=np.concatenate(parts),
        base=copies[0] if first else None,
        models=tuple(copies[first:]),
        start=0,
        n=n,
        shape=(n,),
        fishers=(),
    )


def sample_starts(n: int, blocks: int) -> list[int]:
    """Return where `blocks` blocks spread over `n` elements begin, each at a multiple of 4096."""
    return sorted({int(i * n / blocks) // 4096 * 4096 for i in range(blocks)})


def not_finite(context: Context, job: Job, start: int, stop: int, output: Bytes | None = None) -> ModelError:
    """Return the error that names the first value that is not finite: a diagonal's, an input's, else the result's.

    `output` holds the merged elements, where there are any.
    """
    fisher = bad_fisher(context.reader, job, start, stop)
    if fisher is not None:
        return fisher
    width = itemsize(job.dtype)

    def merged(first: int, last: int) -> Bytes:
        assert output is not None
        return output[(first - start) * width : (last - start) * width]

    return trace(context.reader, job, start, stop, None if output is None else merged).error()
