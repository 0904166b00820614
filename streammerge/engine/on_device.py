"""Merge tensors that live on a GPU: each is copied there once, and its statistics and its merge find it there.

A tensor that does not fit is brought part by part, once for each pass over it. Results do not depend on how it is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np

from streammerge.algebra.block import Applied, Block, BlockMath, Operand, operand_bytes
from streammerge.algebra.rules import Rule
from streammerge.backends.gpu.lane import Lane
from streammerge.dtypes import itemsize
from streammerge.engine.answers import Shared, reducer_of, resolve, slice_of
from streammerge.engine.bringing import Carrier, Halted, host_bytes, room_for_codes
from streammerge.engine.nonfinite import bad_fisher, trace
from streammerge.engine.worker import Worker
from streammerge.errors import WorldError, printable
from streammerge.io.buffer_pool import Bytes
from streammerge.numerics.crc32 import crc32
from streammerge.output.journal import Receipt
from streammerge.planning.job import Job
from streammerge.planning.schedule import Piece
from streammerge.records import dataclass
from streammerge.statistics.base import NotFiniteError, Range, Reducer, Statistic
from streammerge.statistics.passes import collect

_GRAIN = 256
"""Bytes; operands begin at multiples of it."""
_MOST_AT_ONCE = 1 << 30
"""Elements of a launch, which counters of 32 bits count; fused experts have more."""


def merge_on_device(worker: Worker, job: Job, piece: Piece) -> list[Receipt]:
    """Merge a piece on the worker's GPU, for every output that lacks it; the bytes are those of the CPUs.

    The caller holds `host_bytes` of the job.

    Raises
    ------
    ModelError
        If a value is not finite; WorldError if reading, writing or the device fails.
    """
    receipts = list[Receipt]()
    try:
        with Held(worker, job, piece) as held:
            for output in worker.lacking(piece.job, piece.start, piece.stop):
                receipts.append(held.merge(output, output.plan.jobs[piece.job]))
    except Halted:
        pass
    except NotFiniteError:
        fisher = bad_fisher(worker.reader, job, piece.start, piece.stop)
        raise fisher or trace(worker.reader, job, piece.start, piece.stop, None).error(worker) from None
    return receipts


def answer_on_device(worker: Worker, job: Job, outputs: Sequence[tuple[Worker, Job]]) -> None:
    """Answer the statistics of a tensor up to the next of the whole model, for several outputs.

    Raises
    ------
    NotFiniteError
        If a value is not finite.
    """
    piece = Piece(job.ordinal, 0, job.n_elements)
    with worker.lease(host_bytes(job)) as room, suppress(Halted):
        if room is None:
            return
        with Held(worker, job, piece) as held:
            for output, own in outputs:
                held.resolve(output, own, until_model=True)


def add_on_device(worker: Worker, job: Job, piece: Piece, some: Sequence[Reducer[Any]]) -> None:
    """Feed a piece of a streamed pass to reducers.

    Raises
    ------
    NotFiniteError
        If a value is not finite.
    """
    n = piece.stop - piece.start
    with worker.lease(host_bytes(job)) as room, suppress(Halted):
        if room is None:
            return
        with Held(worker, job, piece) as held:
            held.add(some, 0, n, n)


@dataclass(frozen=True)
class _Layout:
    """Where the operands of a block of some elements lie, counted from a place in the arena."""

    operands: tuple[Operand, ...]
    output: Operand
    nbytes: int


class _Placed(NamedTuple):
    """A block on the device."""

    block: Block
    address: int
    """The place from which the offsets of its operands are counted."""
    carrier: Carrier
    """What brought it, and decodes its codes before they are computed with."""


def _laid_out(job: Job, n: int) -> _Layout:
    operands, end = [], 0
    for dtype in (*(ref.dtype for ref in (*job.inputs, *job.fishers)), job.dtype):
        operands.append(Operand(end, dtype))
        end += -(-operand_bytes(operands[-1], n) // _GRAIN) * _GRAIN
    return _Layout(tuple(operands[:-1]), operands[-1], end)


class Held:
    """The elements of a piece on the device: all at once if there is room, else as many as fit, pass by pass.

    Parameters
    ----------
    worker, job, piece
        What is merged, and by whom.

    Raises
    ------
    WorldError
        If the device does not hold a single row.
    """

    def __init__(self, worker: Worker, job: Job, piece: Piece) -> None:
        self._worker, self._job, self._piece = worker, job, piece
        self._lane: Lane = worker.lane
        self._n = piece.stop - piece.start
        self._row = max(1, min(self._n, worker.plan.work[job.ordinal].row))
        self._part = self._fitting()
        self._at_once = min(self._part, max(self._row, _MOST_AT_ONCE // self._row * self._row))
        """Elements that are computed at a time: fewer than are held if their scratch does not fit."""
        self._shared = Shared()
        self._whole: _Placed | None = None
        self._opened = ExitStack()

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *exception: Any) -> None:
        """Give the device's memory back."""
        self._opened.__exit__(*exception)

    def _fitting(self) -> int:
        """Return the number of elements to bring at a time: all of them, or whole rows that fit."""
        limit, first, last = self._lane.arena.limit, self._piece.start, self._piece.stop
        codes = room_for_codes(self._lane, self._job, first, last)
        if _laid_out(self._job, self._n).nbytes + codes <= limit:
            return self._n
        dtypes = [ref.dtype for ref in (*self._job.inputs, *self._job.fishers)]
        nbytes = sum(map(itemsize, [*dtypes, self._job.dtype]))
        for share in (4, 2, 1):  # so that parts of several tensors overlap, if there is room for that
            room = limit // share - _GRAIN * (len(dtypes) + 1) - codes
            if part := max(0, room) // nbytes // self._row * self._row:
                return part
        raise self._too_little()

    def _too_little(self) -> WorldError:
        return WorldError(
            f"tensor {printable(self._job.name)}: the GPU's memory does not hold {self._row} elements of it: end what else "
            "uses it, or merge with --device cpu"
        )

    # --- blocks

    @contextmanager
    def _placed(self, first: int, last: int) -> Iterator[_Placed]:
        """Lend the elements `first` to `last` of the piece on the device; at most `_part` of them."""
        if self._part < self._n:
            with self._brought(first, last) as placed:
                yield placed
            return
        if self._whole is None:
            self._whole = self._opened.enter_context(self._brought(0, self._n))
        whole = self._whole
        if (first, last) == (0, self._n):
            yield whole
        else:
            yield whole._replace(block=slice_of(whole.block, first, last))

    @contextmanager
    def _brought(self, first: int, last: int) -> Iterator[_Placed]:
        """Copy elements of all operands to the device."""
        job, layout, lane = self._job, _laid_out(self._job, last - first), self._lane
        begin, end = self._piece.start + first, self._piece.start + last
        codes = room_for_codes(lane, job, begin, end)
        with lane.arena.lease(layout.nbytes + codes, self._worker.stop) as address:
            if address is None:
                raise Halted
            try:
                carrier = Carrier(self._worker, address + layout.nbytes, codes)
                for ref, operand in zip((*job.inputs, *job.fishers), layout.operands, strict=True):
                    carrier.bring(ref, begin, end, address + operand.offset)
                yield _Placed(self._block(layout, first, last - first), address, carrier)
                carrier.finish()
            except BaseException:
                lane.settle()  # since the next tensor overwrites it
                raise

    def _block(self, layout: _Layout, first: int, n: int) -> Block:
        job, extent = self._job, self._worker.plan.work[self._job.ordinal].extent
        line = job.line_length(extent) if extent.is_line else 0
        base = int(job.base is not None)
        inputs, fishers = layout.operands[: len(job.inputs)], layout.operands[len(job.inputs) :]
        return Block(
            _NOTHING,
            inputs[base:],
            inputs[0] if base else None,
            job.name,
            self._piece.start + first,
            n,
            (n // line, line) if line else (n,),
            self._worker.keys,
            fishers,
        )

    @contextmanager
    def _math(self, placed: _Placed) -> Iterator[BlockMath]:
        """Lend the arithmetic of a block when it is this thread's turn."""
        with ExitStack() as turn:
            with self._worker.stages.time("wait for the GPU"):
                turn.enter_context(self._lane.computing(placed.carrier.event))
            placed.carrier.decode()
            yield self._lane.math(placed.block, placed.address)

    def _fewer(self, n: int) -> None:
        """Compute half as many elements at a time from now on, since the scratch of `n` did not fit."""
        self._at_once = n // 2 // self._row * self._row
        if not self._at_once:
            raise self._too_little()

    # --- statistics

    def resolve(self, output: Worker, own: Job, *, until_model: bool) -> Rule | list[Statistic[Any]]:
        """Return the rule of an output, or the statistics of the whole model that come first with `until_model`."""

        def answer(wanted: Sequence[Statistic[Any]]) -> list[Any]:
            reducers = [reducer_of(output, one, [own], {own.ordinal: one}) for one in wanted]
            sums = any(one.cost.partials for one in wanted)
            most = output.plan.statistics_memory.elements if sums else self._n

            def run_pass(some: Sequence[Reducer[Any]], only: Range | None) -> None:
                first, last = (0, self._n) if only is None else (only[1], min(only[2], self._n))
                self.add(some, first, last, most)

            return collect(reducers, run_pass, None)

        return resolve(output, own, answer, self._shared, until_model=until_model)

    def add(self, some: Sequence[Reducer[Any]], first: int, last: int, most: int) -> None:
        """Feed elements `first` to `last` of the piece to reducers, at most `most` at a time."""
        step = min(self._part, max(self._row, most // self._row * self._row))
        for start in range(first, last, step):
            with self._placed(start, min(last, start + step)) as placed:
                for reducer in some:
                    self._feed(reducer, placed)

    def _feed(self, reducer: Reducer[Any], placed: _Placed) -> None:
        """Feed a block to a reducer, in smaller parts if scratch memory runs out; it has taken nothing then."""
        done, block = 0, placed.block
        while done < block.n:
            n = min(block.n - done, self._at_once)
            part = placed if n == block.n else placed._replace(block=slice_of(block, done, done + n))
            try:
                with self._math(part) as math, self._worker.stages.time("statistics"):
                    reducer.add(self._job.ordinal, part.block.start, n, math)
            except MemoryError:
                self._fewer(n)
                continue
            done += n

    # --- the merge

    def merge(self, output: Worker, own: Job) -> Receipt:
        """Merge the piece for one output, write it, and return the receipt."""
        rule = self.resolve(output, own, until_model=False)
        assert not isinstance(rule, list)
        applied, checksum, done = Applied(0, ()), 0, 0
        while done < self._n:
            n = min(self._n - done, self._part)
            with self._placed(done, done + n) as placed:
                out = _laid_out(own, n).output
                one = self._applied(rule, placed, out)
                self._check(output, own, one, placed, out)
                checksum = self._write(output, own, done, placed.address + out.offset, n, checksum)
            applied = applied.plus(one)
            done += n
        kept, floored, bad = applied.kept, applied.floored, applied.not_finite
        start, stop = self._piece.start, self._piece.stop
        return Receipt(own.ordinal, start, stop, (checksum,), kept, floored, bad, output=output.number)

    def _applied(self, rule: Rule, placed: _Placed, out: Operand) -> Applied:
        """Merge a block into its place on the device, in smaller parts if scratch memory runs out."""
        applied, done, block = Applied(0, ()), 0, placed.block
        while done < block.n:
            n = min(block.n - done, self._at_once)
            part = placed if n == block.n else placed._replace(block=slice_of(block, done, done + n))
            target = Operand(out.offset + done * itemsize(out.dtype), out.dtype)
            try:
                with self._math(part) as math, self._worker.stages.time("compute"):
                    applied = applied.plus(math.apply(rule, target))
            except MemoryError:
                self._fewer(n)
                continue
            done += n
        return applied

    def _check(self, output: Worker, own: Job, applied: Applied, placed: _Placed, out: Operand) -> None:
        """Refuse elements that are not finite unless they are tolerated, and diagonals that are invalid."""
        if not applied.not_finite:
            return
        start, n, width = placed.block.start, placed.block.n, itemsize(out.dtype)
        if (error := bad_fisher(output.reader, own, start, start + n)) is not None:
            raise error
        if output.tolerant:
            return

        def merged(first: int, last: int) -> Bytes:
            return self._lane.fetch(
                placed.address + out.offset + (first - start) * width, (last - first) * width
            )

        raise trace(output.reader, own, start, start + n, merged).error(output)

    def _write(self, output: Worker, own: Job, done: int, address: int, n: int, checksum: int) -> int:
        """Copy a merged block out and write it; return the checksum continued."""
        slot, size = output.plan.layout.slots[own.ordinal][0], itemsize(own.dtype)
        place = slot.offset + (self._piece.start + done) * size

        def write(position: int, data: Bytes) -> None:
            nonlocal checksum
            with self._worker.stages.time("write"):
                output.writer.write(slot.shard, place + position, data)
            with self._worker.stages.time("checksum"):
                checksum = crc32(data, checksum)

        if not self._lane.deliver(address, n * size, place, write, self._worker.stop):
            raise Halted
        return checksum


_NOTHING = np.zeros(0, np.uint8)
