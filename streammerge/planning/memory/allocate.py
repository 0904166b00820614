"""Divide the memory between the process, lists of tensors, statistics and buffers.

::

    --memory  |-- process --|-- lists --|-- statistics --|---------- buffers ----------|
               interpreter,  headers,    counts of        leased by chunks, never
               libraries,    plan,       ranks, partial   more than this in total
               threads       journal     sums of blocks

Pure: numbers in, values out. Every part is bounded before the first byte is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from streammerge.algebra.extent import Extent
from streammerge.errors import BudgetError
from streammerge.planning.job import Job
from streammerge.planning.memory.budget import MIB, SMALLEST_CAPACITY, Budget
from streammerge.planning.schedule import ALIGN, TooLarge, Work
from streammerge.records import dataclass
from streammerge.statistics.base import FEWEST_BINS, MOST_BINS, Statistic
from streammerge.units import format_at_least, format_size, plural

_MOST_PARTIALS = 1 << 20
"""Most bytes of the partial sums of one piece; more would not make reads larger."""
_SHARE = 8
"""Windows of counts take at most 1/8 of the memory beyond the process's own; so do partial sums."""

REF_NBYTES = 240
"""Bytes per input tensor, for its entry in the list of the model's tensors."""
STORED_REF_NBYTES = 900
"""Bytes per tensor of a Fisher store, for its entry and its path."""
JOB_NBYTES = 1400
"""Bytes per output tensor, for its job, slot, header, receipts, journal and manifest."""
ANSWER_NBYTES = 250
"""Bytes per value of a statistic that is kept until the whole model is known: the value, and its text in the journal."""
NAME_COPIES = 8
"""Number of copies of a tensor's name held at once: the name, in headers, in the manifest and in its text."""


@dataclass(frozen=True)
class Needs:
    """The needs of one job."""

    access: Extent
    """The largest extent among its statistics and its arithmetic."""
    holds: bool
    """Whether it needs statistics of its own tensor."""
    sums: bool
    """Whether these statistics are sums over blocks of elements."""
    extent: Extent
    """The extent of its arithmetic."""
    ranks: int = 0
    """Upper bound of the number of rank statistics taken in one pass."""
    partials: int = 0
    """Upper bound of the number of fp64 partial sums per block taken in one pass."""
    kept: int = 0
    """Number of values of its own tensor that are kept until those of the whole model are known."""
    settles: bool = False
    """Whether all that its rule waits for are thresholds; see `streammerge.planning.settling`."""


@dataclass(frozen=True)
class StatisticsMemory:
    """The memory that statistics may use in addition to the buffers."""

    bins: int = MOST_BINS
    """The most bins of one window."""
    elements: int = 1 << 62
    """The most elements whose partial sums are taken at a time."""
    nbytes: int = 0
    """Size of all windows and all partial sums in bytes."""


@dataclass(frozen=True)
class Allocation:
    """The divided memory, and the handling of each job within it."""

    budget: Budget
    """The budget of the buffers; its reserve contains everything else."""
    statistics: StatisticsMemory
    work: tuple[Work, ...]


def asked_together(rounds: Sequence[Sequence[Statistic[Any]]]) -> tuple[int, int, int]:
    """Return `ranks`, `partials` and `kept` of `Needs`."""
    ranks = max((sum(statistic.cost.windows for statistic in one) for one in rounds), default=0)
    partials = max((sum(statistic.cost.partials for statistic in one) for one in rounds), default=0)
    last = max((i for i, one in enumerate(rounds) if one[0].extent == Extent.MODEL), default=0)
    return ranks, partials, sum(len(one) for one in rounds[:last] if one[0].extent == Extent.TENSOR)


def statistics_memory(ranks: int, partials: int, largest: int, budget: Budget) -> StatisticsMemory:
    """Return the memory for statistics.

    Every worker counts its own window, and one window per rank holds the total. The partial sums of a piece wait for
    those of all earlier pieces: two pieces per worker are in flight, and each worker sums one more.

    Parameters
    ----------
    ranks, partials
        As in `Needs`, over all jobs.
    largest
        Number of elements of the largest scope that is ranked.
    budget
        The memory, before statistics are subtracted.
    """
    share = budget.capacity // _SHARE
    bins, elements, nbytes = MOST_BINS, 1 << 62, 0
    if ranks:
        of_one_bin = ranks * (4 if largest < 1 << 31 else 8) + 4 * budget.workers
        bins = max(FEWEST_BINS, min(MOST_BINS, share // of_one_bin))
        nbytes += bins * of_one_bin
    if partials:
        of_one_block = 8 * partials
        waiting = 3 * budget.workers
        blocks = max(1, min(_MOST_PARTIALS, share // waiting) // of_one_block)
        elements = blocks * ALIGN
        nbytes += waiting * blocks * of_one_block
    return StatisticsMemory(bins, elements, nbytes)


def lists_nbytes(n_refs: int, n_stored: int, jobs: Sequence[Job], needs: Sequence[Needs]) -> int:
    """Return an upper bound of the bytes of lists of tensors, from the headers to the manifest.

    Parameters
    ----------
    n_refs, n_stored
        Number of tensors of all inputs, and of all Fisher stores.
    """
    names = sum(len(job.name) for job in jobs)
    kept = sum(need.kept for need in needs)
    of_inputs = n_refs * REF_NBYTES + n_stored * STORED_REF_NBYTES
    return of_inputs + len(jobs) * JOB_NBYTES + NAME_COPIES * names + kept * ANSWER_NBYTES


def allocate(
    budget: Budget,
    jobs: Sequence[Job],
    needs: Sequence[Needs],
    lists: int,
    plan_work: Callable[[Job, Needs, Budget], Work],
    beside: Callable[[Job, Needs, Work], int],
) -> Allocation:
    """Divide the memory, and decide how each job is handled.

    Parameters
    ----------
    budget
        The memory, before lists and statistics are subtracted.
    lists
        Size of lists of tensors in bytes.
    plan_work
        Function that decides how one job is handled; it raises `TooLarge`.
    beside
        Function that returns the bytes that a job's statistics need in addition to buffers and windows.

    Raises
    ------
    BudgetError
        If it does not fit. The memory that the message asks for suffices.
    """

    def divided(total: Budget) -> Allocation:
        return divide(total, jobs, needs, lists, plan_work, beside)

    try:
        return divided(budget)
    except TooLarge as error:
        least = least_total(budget, error.least, divided)
        raise TooLarge(error.name, error.what, error.needed, error.budget, least) from None
    except TooLittle as error:
        least = least_total(budget, error.least, divided)
        left = divided(Budget(least, budget.reserve, budget.threads)).budget
        raise BudgetError(
            f"--memory {format_size(budget.total)} is too little: the process itself needs "
            f"{format_size(budget.reserve)}, lists of {plural(len(jobs), 'tensor')} and their inputs {format_size(lists)}, "
            f"statistics {format_size(left.reserve - budget.reserve - lists)}, buffers {format_size(left.capacity)}; "
            f"give at least {format_at_least(least)}",
            least,
        ) from None


class TooLittle(Exception):
    """The memory left for buffers is below their minimum."""

    def __init__(self, least: int) -> None:
        self.least = least


def least_total(budget: Budget, known: int, divide: Callable[[Budget], Allocation]) -> int:
    """Return the least sufficient memory, in whole MiB; at least `known` bytes are needed."""
    total = -(-known // MIB) * MIB
    while True:
        try:
            divide(Budget(total, budget.reserve, budget.threads))
        except (TooLarge, TooLittle) as error:
            total = max(total + MIB, -(-error.least // MIB) * MIB)
        else:
            return total


def divide(
    budget: Budget,
    jobs: Sequence[Job],
    needs: Sequence[Needs],
    lists: int,
    plan_work: Callable[[Job, Needs, Budget], Work],
    beside: Callable[[Job, Needs, Work], int],
) -> Allocation:
    """Divide the memory as `allocate` does.

    Raises
    ------
    TooLarge, TooLittle
        If it does not fit.
    """
    budget = _with_buffers(budget, lists)
    ranks = max((need.ranks for need in needs), default=0)
    partials = max((need.partials for need in needs), default=0)
    statistics = statistics_memory(
        ranks, partials, sum(job.n_elements for job in jobs if job.kind == "merge"), budget
    )
    extra = 0
    while True:  # smaller buffers stream more tensors, whose statistics in turn need memory
        left = _with_buffers(budget, statistics.nbytes + extra)
        work = _work_of(jobs, needs, left, plan_work)
        wanted = max(map(beside, jobs, needs, work), default=0)
        if wanted <= extra:
            return Allocation(left, statistics, tuple(work))
        extra = wanted


def _with_buffers(budget: Budget, nbytes: int) -> Budget:
    left = budget.less(nbytes)
    if left is not budget and left.capacity < SMALLEST_CAPACITY:
        raise TooLittle(left.reserve + SMALLEST_CAPACITY)
    return left


def _work_of(
    jobs: Sequence[Job],
    needs: Sequence[Needs],
    budget: Budget,
    plan_work: Callable[[Job, Needs, Budget], Work],
) -> list[Work]:
    """Return the handling of each job; if some do not fit, refuse the most demanding one."""
    known: dict[tuple[object, ...], Work] = {}
    same: dict[Work, Work] = {}
    refused: TooLarge | None = None
    work = []
    for job, need in zip(jobs, needs, strict=True):
        key = _likeness(job, need)
        if key not in known:
            try:
                how = plan_work(job, need, budget)
            except TooLarge as error:
                refused = error if refused is None or error.needed > refused.needed else refused
                continue
            known[key] = same.setdefault(how, how)  # shared objects: there may be many tensors
        work.append(known[key])
    if refused is not None:
        raise refused
    return work


def _likeness(job: Job, need: Needs) -> tuple[object, ...]:
    """Return a key of everything that determines the handling of a job."""
    fishers = tuple((ref.dtype, getattr(ref, "chunk", None)) for ref in job.fishers)
    inputs = tuple((ref.dtype, ref.scratch_bytes) for ref in job.inputs)
    return (
        job.kind,
        job.dtype,
        None if job.encoder is None else tuple((part.dtype, part.shape) for part in job.parts),
        None if job.encoder is None else (type(job.encoder), job.encoder.unit, job.encoder.needs_peak),
        job.shape,
        inputs,
        fishers,
        need.access,
        need.holds,
        need.sums,
        need.extent,
        need.settles,
        job.keeps_inputs,
        bool(job.grams),
        job.outputs_at_once,
    )
