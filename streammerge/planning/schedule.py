"""Cut jobs into pieces, and pack pieces into chunks that fit the budget.

Pure: numbers in, values out. A chunk is the unit of memory, of work and of the journal::

    jobs      |---- embed ----|-- q --|-- k --|norm|---- mlp ----|
    pieces    | 0..a | a..b | b..n |   |       |    |             |
    chunks    [------][------][----------------------][----------]

Every cut lies at a multiple of `ALIGN` elements (or of a row), so statistics summed per block do
not depend on where the cuts are. Cuts of encoded tensors also lie between whole units of storage (`Form.unit`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from streammerge.algebra.extent import Extent
from streammerge.algebra.gram_matrix import rows_at_once
from streammerge.algebra.rules import ROWS_AT_ONCE
from streammerge.dtypes import itemsize
from streammerge.errors import BudgetError, printable
from streammerge.numerics.ordered_sum import BLOCK
from streammerge.planning.job import Job
from streammerge.planning.memory.budget import Budget
from streammerge.planning.memory.buffers import alignment_bytes, bytes_per_element
from streammerge.records import dataclass
from streammerge.tensors.encoders.base import Form
from streammerge.units import format_at_least, format_size

ALIGN = BLOCK
"""Number of elements in a block of the fp64 statistics."""

PASSES_AHEAD = 2
"""Most streamed tensors that wait for their merge; more would evict pages from the cache before they are read again."""

TILE = 1 << 18
"""Elements that are merged before they are encoded: as fp32 they stay in the cache."""
_FRAME = 64
"""Bytes by which a compressed chunk may exceed incompressible data."""

Mode = Literal["split", "resident", "streamed"]

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start` to `stop` of one job's tensor."""

    job: int
    start: int
    stop: int


@dataclass(frozen=True)
class Chunk:
    """Pieces that are read, merged and written together."""

    pieces: tuple[Piece, ...]
    nbytes: int
    """Bytes of buffers that it holds while it runs."""
    rehearsal: bool = False
    """Whether it only finds the parts that are written before others; see `streammerge.planning.streamed`."""


@dataclass(frozen=True)
class StatisticsPass:
    """Statistics of a tensor that is too large to hold; they are streamed before its pieces are merged."""

    job: int


Step = Chunk | StatisticsPass


class TooLarge(BudgetError):
    """A part of a tensor must be held in memory and does not fit in the buffers.

    Parameters
    ----------
    needed
        Bytes of buffers.
    least
        Bytes of ``--memory`` that suffice; None: `needed` plus the reserve.
    """

    def __init__(self, name: str, what: str, needed: int, budget: Budget, least: int | None = None) -> None:
        self.name, self.what, self.needed, self.budget = name, what, needed, budget
        least = needed + budget.reserve if least is None else least
        super().__init__(
            f"{printable(name)}: this method holds {what}, {format_size(needed)}, in memory; "
            f"--memory {format_size(budget.total)} leaves {format_size(budget.capacity)}: "
            f"give at least {format_at_least(least)}, or use a method that splits further",
            least,
        )
        self.least: int


@dataclass(frozen=True, slots=True)
class Work:
    """The handling of the pieces of one job, chosen for the budget."""

    mode: Mode
    """`split`: cut anywhere. `resident`: held whole, statistics from memory. `streamed`: passes for statistics, then cut."""
    row: int
    """Cuts are at multiples of this number of elements."""
    bytes_per_element: float
    """Buffer bytes per element of a piece."""
    workspace: int
    """Additional buffer bytes per chunk: alignment, scratch, temporaries of a torch formula."""
    extent: Extent = Extent.ELEMENT
    at_once: int | None = None
    """Elements of an encoded tensor merged at a time, in the same memory, and then encoded; None: whole pieces. For
    factors: the elements that are held between products."""
    on_device: bool = False
    """Whether its pieces are merged in the memory of a GPU, and lease no buffer then; parts of them may still be held."""

    settles: bool = False
    """Whether a streamed tensor is merged while its thresholds are counted: see `streammerge.planning.settling`."""

    @property
    def reads_twice(self) -> bool:
        """Whether its statistics are a pass of their own."""
        return self.mode == "streamed" and not self.settles

    def lease_bytes(self, n: int) -> int:
        """Return the size of the buffer for `n` elements in bytes."""
        return math.ceil(n * self.bytes_per_element) + self.workspace


def plan_work(
    job: Job,
    extent: Extent,
    budget: Budget,
    *,
    workspace: Callable[[Job, int], int],
    holds: bool,
    sums: bool = True,
    row_bytes: int = 0,
    tiled: bool = False,
) -> Work:
    """Choose the handling of the pieces of one job.

    Parameters
    ----------
    extent
        The extent of its arithmetic.
    workspace
        Function that returns the bytes of temporaries for a block of a job, given its number of elements.
    holds
        Whether statistics of this tensor precede its merge.
    sums
        Whether these are sums over blocks of `ALIGN` elements, which cuts must not divide.
    row_bytes
        Bytes that are kept per row, if the extent is a row.
    tiled
        Whether a few elements at a time are merged as fast as many.

    Raises
    ------
    BudgetError
        If the tensor, or one row of it, must be held and does not fit.
    """
    how = _work_of_method(job, extent, budget, workspace, holds, sums, row_bytes)
    return how if job.encoder is None else _in_units(job, job.encoder, how, budget, tiled)


def _in_units(job: Job, encoder: Form, how: Work, budget: Budget, tiled: bool) -> Work:
    """Return the handling of a job whose pieces must also be cut between whole units of an encoder."""
    row = min(job.n_elements, math.lcm(how.row, encoder.unit))
    how = replace(how, workspace=how.workspace + encoder.scratch_bytes)
    if encoder.needs_peak and how.mode == "split":
        held = job.n_elements * how.bytes_per_element + how.workspace <= budget.resident_limit
        how = replace(how, mode="resident" if held else "streamed")
    rows = -(-row // job.row_length)
    if tiled and how.extent != Extent.TENSOR:
        at_once = min(job.n_elements, max(row, TILE // row * row))
        merged = itemsize("F32")
        how = replace(
            how,
            bytes_per_element=how.bytes_per_element - merged,
            workspace=how.workspace + merged * at_once,
            at_once=at_once,
        )
    return _fitting(job, replace(how, row=row), row, f"{rows} rows of it ({encoder.label})", budget)


def _work_of_method(
    job: Job,
    extent: Extent,
    budget: Budget,
    workspace: Callable[[Job, int], int],
    holds: bool,
    sums: bool,
    row_bytes: int,
) -> Work:
    per_element = bytes_per_element(job) + (row_bytes / job.row_length if extent == Extent.ROW else 0.0)

    def work(mode: Mode, row: int) -> Work:
        # A piece reads the chunks of a Fisher store one after the other, through an extra buffer.
        beside = workspace(job, row) + chunk_scratch(job) + alignment_bytes(job)
        return Work(mode, row, per_element, beside, extent)

    if 0 < job.matrix_elements < job.n_elements and not any(ref.is_whole for ref in job.inputs):
        n = job.matrix_elements
        return _fitting(job, work("split", n), n, "a whole matrix of it", budget)
    if extent == Extent.TENSOR or any(ref.is_whole for ref in job.inputs):
        n = job.n_elements
        return _fitting(job, work("resident", n), n, "the whole tensor", budget)
    if holds:
        line = job.line_length(extent)
        row = ALIGN
        if extent != Extent.ELEMENT:
            row = line * (rows_at_once(line) if extent == Extent.COLUMN else 1)
            row = min(job.n_elements, math.lcm(ALIGN, row) if sums else row)
        held = work("resident", row)
        resident = job.n_elements * per_element + held.workspace <= budget.resident_limit
        what = "a block of it" if extent == Extent.ELEMENT else f"{row // line} rows of it"
        return _fitting(job, held if resident else work("streamed", row), row, what, budget)
    if extent == Extent.ROW:
        row = job.row_length * (ROWS_AT_ONCE if job.grams else 1)
        what = f"{ROWS_AT_ONCE} rows of it and matrices of its inputs" if job.grams else "one row of it"
        return _fitting(job, work("split", row), row, what, budget)
    cut = work("split", ALIGN)
    row = _store_row(job)
    if row * per_element <= min(budget.chunk_target, budget.capacity - cut.workspace):
        cut = replace(cut, row=row)
    return _fitting(job, cut, cut.row, "a block of it", budget)


def _store_row(job: Job) -> int:
    """Return the number of elements per chunk of the first Fisher store; pieces cut there read each chunk once."""
    stores = [ref for ref in job.fishers if ref.chunk_elements]
    if not stores or stores[0].chunk_elements >= job.n_elements:
        return ALIGN
    row = stores[0].chunk_elements
    return row if row % ALIGN == 0 or len(stores) == len(job.fishers) else ALIGN


def chunk_scratch(job: Job) -> int:
    """Return the buffer bytes needed to read data that must be decoded.

    For a Fisher store these are a compressed and a decompressed chunk.
    """
    return max(ref.scratch_bytes for ref in job.held)


def _fitting(job: Job, work: Work, n: int, what: str, budget: Budget) -> Work:
    """Return `work` if `n` elements and its workspace fit the capacity; else refuse with the numbers."""
    needed = math.ceil(min(n, job.n_elements) * work.bytes_per_element) + work.workspace
    if needed > budget.capacity:
        raise TooLarge(job.name, what, needed, budget)
    return work


def steps(
    jobs: Sequence[Job],
    work: Sequence[Work],
    budget: Budget,
    done: Mapping[int, Sequence[Interval]],
) -> Iterator[Step]:
    """Yield the remaining steps in file order; `done` has the finished elements of each job."""
    pieces: list[Piece] = []
    held = 0.0
    workspace = 0
    for job, how in zip(jobs, work, strict=True):
        left = remaining(job.n_elements, done.get(job.ordinal, ()))
        if not left and job.n_elements:
            continue
        if how.mode == "streamed" or job.waits:
            if pieces:
                yield Chunk(tuple(pieces), int(held) + workspace)
                pieces, held, workspace = [], 0.0, 0
            yield StatisticsPass(job.ordinal)
        for piece in _pieces(job, how, budget, left):
            nbytes = (piece.stop - piece.start) * how.bytes_per_element
            room = 0 if how.on_device else how.workspace
            too_much = held + nbytes > budget.chunk_target or held + nbytes + room > budget.capacity
            if pieces and too_much:
                yield Chunk(tuple(pieces), int(held) + workspace)
                pieces, held, workspace = [], 0.0, 0
            pieces.append(piece)
            held += nbytes
            workspace = max(workspace, how.workspace)
    if pieces:
        yield Chunk(tuple(pieces), int(held) + workspace)


def _pieces(job: Job, how: Work, budget: Budget, left: Sequence[Interval]) -> Iterator[Piece]:
    if how.mode == "resident" or not job.n_elements:
        yield Piece(job.ordinal, 0, job.n_elements)
        return
    size = piece_elements(how, budget)
    for start, stop in left:
        for first in range(start, stop, size):
            yield Piece(job.ordinal, first, min(stop, first + size))


def piece_elements(how: Work, budget: Budget) -> int:
    """Return the number of elements of a piece: whole rows, as many as the chunk target holds."""
    room = min(budget.chunk_target, budget.capacity - how.workspace)
    fit = int(room / max(how.bytes_per_element, 1e-9))
    return max(1, fit // how.row) * how.row


def streamed_pieces(job: Job, how: Work, budget: Budget, start: int, stop: int, most: int) -> Iterator[Piece]:
    """Yield the pieces of a statistics pass over a range of a job: whole rows, at most `most` elements each."""
    size = max(how.row, min(piece_elements(how, budget), most // how.row * how.row))
    stop = min(stop, job.n_elements)
    for first in range(start, stop, size):
        yield Piece(job.ordinal, first, min(stop, first + size))


def remaining(n: int, done: Sequence[Interval]) -> list[Interval]:
    """Return the gaps that `done` leaves in ``range(n)``.

    >>> remaining(10, [(6, 8), (0, 2)])
    [(2, 6), (8, 10)]
    """
    gaps = []
    position = 0
    for start, stop in sorted(done):
        if start > position:
            gaps.append((position, start))
        position = max(position, stop)
    if position < n:
        gaps.append((position, n))
    return gaps
