"""Run one chunk, from input bytes to written and checksummed output."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace

import numpy as np

from streammerge.algebra.block import Applied, Block, Operand
from streammerge.algebra.rules import Rule
from streammerge.dtypes import BITS, itemsize
from streammerge.engine.answers import Shared, resolve_in_memory, slice_of
from streammerge.engine.at_once import apply_together, together
from streammerge.engine.bringing import host_bytes
from streammerge.engine.factors import factors_of
from streammerge.engine.loading import load
from streammerge.engine.nonfinite import bad_fisher, trace
from streammerge.engine.on_device import merge_on_device
from streammerge.engine.peaks import known_peak, largest
from streammerge.engine.worker import Worker, math_for, math_of
from streammerge.errors import ModelError
from streammerge.formats.refs import SourceRef
from streammerge.io.buffer_pool import Bytes
from streammerge.io.pages import DIRECT_BYTES, PAGE
from streammerge.numerics.casts import narrow
from streammerge.numerics.crc32 import crc32
from streammerge.numerics.encoding import Values
from streammerge.numerics.finite import tally
from streammerge.output.journal import Receipt
from streammerge.planning.job import Job
from streammerge.planning.memory.buffers import Places, divide
from streammerge.planning.schedule import TILE, Chunk, Piece
from streammerge.records import dataclass
from streammerge.statistics.base import NotFiniteError
from streammerge.tensors.encoders.base import Encoder
from streammerge.tensors.read import read_source


def run_chunk(
    worker: Worker, chunk: Chunk, turn: AbstractContextManager[None] | None = None
) -> list[Receipt]:
    """Read, merge, write and checksum the pieces of a chunk, for every output that lacks them. Running it twice is safe.

    The result depends only on the chunk, the worker's specification and its known statistics.

    Parameters
    ----------
    turn
        Entered before the chunk's buffer is leased, and left as soon as it has it.

    Returns the receipts of the finished pieces: all pieces, unless `worker.stop` was set. Their bytes are written, and
    are durable once the worker's writer has been synced.

    Raises
    ------
    ModelError
        If a value is not finite; WorldError if reading or writing fails.
    """
    work = worker.plan.work
    nbytes = max(_lease_bytes(worker, piece) for piece in chunk.pieces)
    receipts: list[Receipt] = []
    with ExitStack() as held:
        with turn or nullcontext():
            buffer = held.enter_context(worker.lease(nbytes))
        if buffer is None:
            return receipts
        for piece in chunk.pieces:
            if worker.stop.is_set():
                break
            job = worker.plan.jobs[piece.job]
            if work[piece.job].on_device:
                receipts += merge_on_device(worker, job, piece)
            else:
                receipts += _way_of(job)(worker, job, piece, buffer)
            if piece.stop - piece.start == job.n_elements:
                for output in worker.outputs:  # freed early: thousands of tensors may share a chunk
                    output.answers.pop(job.ordinal, None)
    return receipts


def _lease_bytes(worker: Worker, piece: Piece) -> int:
    """Return the bytes of this process's memory that a piece takes."""
    work = worker.plan.work[piece.job]
    if work.on_device:
        return host_bytes(worker.plan.jobs[piece.job])
    return work.lease_bytes(piece.stop - piece.start)


def _way_of(job: Job) -> Callable[[Worker, Job, Piece, Bytes], list[Receipt]]:
    if job.kind == "factor":
        return _factor_piece
    if job.encoder is not None:
        return _encode_piece
    return _copy_piece if job.is_copied else _merge_piece


def _divided(worker: Worker, job: Job, piece: Piece) -> Places:
    return divide(job, piece.stop - piece.start, worker.plan.work[job.ordinal].at_once)


@dataclass(frozen=True)
class _Merged:
    """Merged elements in the buffer of their piece, in the job's dtype."""

    data: Bytes
    applied: Applied


def _merge_piece(worker: Worker, job: Job, piece: Piece, buffer: Bytes) -> list[Receipt]:
    loaded = load(worker, job, piece.start, piece.stop, buffer)
    place, shared = _file_offset(worker, job, piece), Shared()
    outputs = worker.lacking(piece.job, piece.start, piece.stop)
    if job.outputs_at_once > 1 and len(outputs) > 1:
        return _merge_at_once(outputs, job, piece, loaded, shared)
    receipts = []
    for output in outputs:
        merged = _merge(output, loaded, output.plan.jobs[piece.job], place, shared)
        receipts.append(_emit(output, piece, [merged.data], merged.applied))
    return receipts


def _merge_at_once(
    outputs: Sequence[Worker], job: Job, piece: Piece, loaded: Block, shared: Shared
) -> list[Receipt]:
    """Merge a piece for several outputs; those that differ only in the scale of the same sum are computed together."""
    places, target = divide(job, loaded.n), _file_offset(outputs[0], job, piece)
    assert places.output is not None
    slots = [places.output, *places.more]
    if places.paged:  # as in the file
        slots = [slot + target % PAGE for slot in slots]
    receipts = []
    for some in together({one: _rule_of(one, loaded, piece, shared) for one in outputs}, len(slots)):
        outs = [Operand(slot, job.computed_dtype) for slot in slots[: len(some)]]
        own = outputs[0].plan.jobs[piece.job]
        with math_for(outputs[0], own, loaded) as math, outputs[0].stages.time("compute"):
            applied = apply_together(math, list(some.values()), outs)
        for output, out, one in zip(some, outs, applied, strict=True):
            merged = _rounded(output, output.plan.jobs[piece.job], loaded, out, one)
            receipts.append(_emit(output, piece, [merged.data], merged.applied))
    return receipts


def _rule_of(worker: Worker, loaded: Block, piece: Piece, shared: Shared) -> Rule:
    """Return the rule of an output for a piece."""
    job = worker.plan.jobs[piece.job]
    try:
        with math_for(worker, job, loaded) as math, worker.stages.time("statistics"):
            rule = resolve_in_memory(worker, job, loaded, math, shared, until_model=False)
    except NotFiniteError:
        raise not_finite(worker, job, piece.start, piece.stop) from None
    assert not isinstance(rule, list)
    return rule


def merged_elements(worker: Worker, job: Job, start: int, stop: int, buffer: Bytes) -> Bytes:
    """Merge elements `start` to `stop` of a job in a buffer; return where they lie in it, in the job's dtype.

    The statistics of the tensor must be known, unless it is whole.

    Raises
    ------
    ModelError
        If a value is not finite; WorldError if reading fails.
    """
    return _merge(worker, load(worker, job, start, stop, buffer), job, 0, Shared()).data


def _merge(worker: Worker, loaded: Block, job: Job, place: int, shared: Shared) -> _Merged:
    """Merge loaded elements; `place`: the offset in a file that they will have."""
    try:
        with math_for(worker, job, loaded) as math:
            with worker.stages.time("statistics"):
                rule = resolve_in_memory(worker, job, loaded, math, shared, until_model=False)
            assert not isinstance(rule, list)
            out = place_output(job, loaded, place)
            with worker.stages.time("compute"):
                applied = math.apply(rule, out)
    except NotFiniteError:
        raise not_finite(worker, job, loaded.start, loaded.start + loaded.n) from None
    return _rounded(worker, job, loaded, out, applied)


def _rounded(worker: Worker, job: Job, loaded: Block, out: Operand, applied: Applied) -> _Merged:
    """Return merged elements in the job's dtype; refuse non-finite ones unless they are tolerated."""
    start, stop = loaded.start, loaded.start + loaded.n
    data = loaded.buffer[out.offset : out.offset + loaded.n * itemsize(out.dtype)]
    narrowed = clipped = 0
    if out.dtype != job.dtype:
        with worker.stages.time("compute"):
            narrowed, clipped = narrow(data.view(np.float32), job.dtype, data)
        data = data[: loaded.n]
    if (applied.not_finite or clipped) and not worker.tolerant:
        raise not_finite(worker, job, start, stop, data)
    if applied.not_finite and (error := bad_fisher(worker.reader, job, start, stop)) is not None:
        raise error
    if out.dtype != job.dtype:
        applied = replace(applied, not_finite=narrowed)
    return _Merged(data, applied)


def _encode_piece(worker: Worker, job: Job, piece: Piece, buffer: Bytes) -> list[Receipt]:
    loaded, shared = load(worker, job, piece.start, piece.stop, buffer), Shared()
    outputs = worker.lacking(piece.job, piece.start, piece.stop)
    return [_encode_one(one, one.plan.jobs[piece.job], piece, loaded, shared) for one in outputs]


def _encode_one(worker: Worker, job: Job, piece: Piece, loaded: Block, shared: Shared) -> Receipt:
    """Merge loaded elements, encode and write them, a few at a time, while they are in the cache."""
    encoder, buffer = job.encoder, loaded.buffer
    assert isinstance(encoder, Encoder)
    places = _divided(worker, job, piece)
    spans, slots = job.spans(piece.start, piece.stop), worker.plan.layout.slots[job.ordinal]
    begins = [
        places.part_at(i, slot.offset + first)
        for i, (slot, (first, _)) in enumerate(zip(slots, spans, strict=True))
    ]
    peak = known_peak(worker, job)

    def look(first: int, values: Values) -> None:
        nonlocal peak
        peak = max(peak or 0.0, largest(values))

    def encode(first: int, values: Values) -> None:
        start = piece.start + first
        own = job.spans(start, start + values.size)
        outs = [
            buffer[begin + a - whole : begin + b - whole]
            for begin, (a, b), (whole, _) in zip(begins, own, spans, strict=True)
        ]
        encoder.encode(values, start, outs, peak)

    looks = [look] if encoder.needs_peak and peak is None else []
    applied = merge_by_tiles(worker, job, piece, loaded, shared, *looks, encode)
    parts = [buffer[a : a + last - first] for a, (first, last) in zip(begins, spans, strict=True)]
    return _emit(worker, piece, parts, applied)


def _factor_piece(worker: Worker, job: Job, piece: Piece, buffer: Bytes) -> list[Receipt]:
    """Compute the factors of the change of a weight, and write them; the piece is the whole weight."""
    return [
        _emit(one, piece, factors_of(one, one.plan.jobs[piece.job], buffer), Applied(0, ()))
        for one in worker.lacking(piece.job, piece.start, piece.stop)
    ]


def merge_by_tiles(
    worker: Worker,
    job: Job,
    piece: Piece,
    loaded: Block,
    shared: Shared,
    *takes: Callable[[int, Values], None],
) -> Applied:
    """Merge a loaded piece that is to be encoded, `Work.at_once` elements at a time, once for each of `takes`.

    Each function receives the number of the first element, counted from the start of the piece, and the values, all
    finite. The next call reuses the memory of the values.

    Raises
    ------
    ModelError
        If a value is not finite.
    """
    begins, buffer = _divided(worker, job, piece).output, loaded.buffer
    assert begins is not None
    size = worker.plan.work[job.ordinal].at_once or max(1, loaded.n)
    applied = Applied(0, ())
    try:
        with math_for(worker, job, loaded) as math:
            with worker.stages.time("statistics"):
                rule = resolve_in_memory(worker, job, loaded, math, shared, until_model=False)
            assert not isinstance(rule, list)
            for take in takes:
                applied = Applied(0, ())
                for first in range(0, loaded.n, size):
                    n = min(size, loaded.n - first)
                    tile = loaded if n == loaded.n else slice_of(loaded, first, first + n)
                    its_math = math if n == loaded.n else math_of(worker, job, tile)
                    data = buffer[begins : begins + 4 * n]
                    with worker.stages.time("compute"):
                        one = its_math.apply(rule, Operand(begins, "F32"))
                        if one.not_finite:
                            raise not_finite(worker, job, tile.start, tile.start + n, data)
                        applied = applied.plus(one)
                        for a, b in _strips(job, n):
                            take(first + a, data[4 * a : 4 * b].view(np.float32))
    except NotFiniteError:
        raise not_finite(worker, job, piece.start, piece.stop) from None
    return applied


def _strips(job: Job, n: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of `n` merged elements that are encoded together, in whole units; a range bounds temporaries."""
    size = max(job.unit, TILE // job.unit * job.unit)
    for first in range(0, n, size):
        yield first, min(n, first + size)


def _copy_piece(worker: Worker, job: Job, piece: Piece, buffer: Bytes) -> list[Receipt]:
    first, last = (e * BITS[job.dtype] // 8 for e in (piece.start, piece.stop))
    places = divide(job, piece.stop - piece.start)

    def read(ref: SourceRef, slot: int) -> tuple[int, Bytes]:
        room, scratch = buffer[slot:], buffer[places.scratch :]
        begins = slot + read_source(worker.reader, ref, piece.start, piece.stop, room, scratch, worker.stages)
        return begins, buffer[begins : begins + last - first]

    source, *others = job.sources
    begins, data = read(source, places.slots[0])
    differs = False
    for ref in others:
        differs |= not np.array_equal(data, read(ref, places.slots[1])[1])
    target = places.output_at(begins, _file_offset(worker, job, piece))
    if target != begins and data.size >= DIRECT_BYTES:
        moved = buffer[target : target + data.size]
        ctypes.memmove(
            moved.ctypes.data, data.ctypes.data, data.size
        )  # they overlap, so numpy would copy twice
        data = moved
    with worker.stages.time("compute"):
        bad = tally(data, job.dtype).count
    outputs = worker.lacking(piece.job, piece.start, piece.stop)
    return [replace(_emit(one, piece, [data], Applied(bad, ())), differs=differs) for one in outputs]


def _file_offset(worker: Worker, job: Job, piece: Piece) -> int:
    return worker.plan.layout.slots[job.ordinal][0].offset + job.spans(piece.start, piece.stop)[0][0]


def _emit(worker: Worker, piece: Piece, parts: Sequence[Bytes], applied: Applied) -> Receipt:
    """Write the bytes of each part of a piece, and return their receipt."""
    job = worker.plan.jobs[piece.job]
    spans, slots = job.spans(piece.start, piece.stop), worker.plan.layout.slots[job.ordinal]
    checksums = []
    for data, slot, (first, _) in zip(parts, slots, spans, strict=True):
        with worker.stages.time("write"):
            worker.writer.write(slot.shard, slot.offset + first, data)
        with worker.stages.time("checksum"):
            checksums.append(crc32(data))
    return Receipt(
        job.ordinal,
        piece.start,
        piece.stop,
        tuple(checksums),
        applied.kept,
        applied.floored,
        applied.not_finite,
        output=worker.number,
    )


def place_output(job: Job, loaded: Block, place: int) -> Operand:
    """Place the output over the first input if its elements are not wider, else after all inputs."""
    first = loaded.base or loaded.models[0]
    # Rounded in its own slot, whose offset does not suit direct I/O.
    if job.computed_dtype != job.dtype:
        own = divide(job, loaded.n).output
        assert own is not None
        return Operand(own, job.computed_dtype)
    offset = divide(job, loaded.n).output_at(first.offset, place)
    return Operand(offset, job.dtype)


def not_finite(worker: Worker, job: Job, start: int, stop: int, output: Bytes | None = None) -> ModelError:
    """Return the error that names the first non-finite value: of a diagonal, of an input, or of the result.

    `output` holds the merged elements, if there are any.
    """
    fisher = bad_fisher(worker.reader, job, start, stop)
    if fisher is not None:
        return fisher
    width = itemsize(job.dtype)

    def merged(first: int, last: int) -> Bytes:
        assert output is not None
        return output[(first - start) * width : (last - start) * width]

    return trace(worker.reader, job, start, stop, None if output is None else merged).error(worker)
