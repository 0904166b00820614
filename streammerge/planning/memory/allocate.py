"""How the memory is divided: what the process needs, lists of tensors, statistics, and what is left for buffers.

::

    --memory  |-- process --|-- lists --|-- statistics --|---------- buffers ----------|
               interpreter,  headers,    counts of        leased by chunks, and never
               libraries,    plan,       ranks, partial   more of them than this
               threads       journal     sums of blocks

Pure: numbers in, values out. All of it is bounded before the first byte is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.algebra.extent import Extent
from streammerge.errors import BudgetError
from streammerge.planning.job import Job
from streammerge.planning.memory.budget import MIB, SMALLEST_CAPACITY, Budget
from streammerge.planning.schedule import ALIGN, TooLarge, Work
from streammerge.statistics.base import FEWEST_BINS, MOST_BINS, Statistic
from streammerge.units import format_at_least, format_size

_MOST_PARTIALS = 1 << 20
"""Bytes of the partial sums of one piece, at most: more of them do not make larger reads."""
_SHARE = 8
"""Windows of counts, and partial sums, take at most one in so many bytes of what is not the process's own."""

REF_NBYTES = 240
"""Of a tensor of an input: its entry in the list of the model's tensors."""
STORED_REF_NBYTES = 900
"""The same of a Fisher store, which has a file path for each."""
JOB_NBYTES = 1400
"""Of a tensor of the output: its job, slot and header, receipts of its pieces, journal and manifest."""
ANSWER_NBYTES = 250
"""Of an answer that is kept until the whole model is known: itself, and as the journal has it."""
NAME_COPIES = 8
"""How often its name is held at the same time: itself, in headers, in the manifest and its text."""


@dataclass(frozen=True)
class Needs:
    """What the merge of a tensor asks for."""

    access: Extent
    """How far it reaches."""
    holds: bool
    """Whether it takes statistics of its own tensor."""
    sums: bool
    """Whether these are sums over blocks of elements."""
    extent: Extent
    """What its arithmetic must see at once."""
    ranks: int = 0
    """Order statistics asked for together, at most."""
    partials: int = 0
    """fp64 partial sums of each block of elements asked for together, at most."""
    kept: int = 0
    """Answers of its own tensor that wait for those of the whole model, as all other tensors' do."""


@dataclass(frozen=True)
class StatisticsMemory:
    """What statistics may take beside the buffers."""

    bins: int = MOST_BINS
    """Counts of one window, at most."""
    elements: int = 1 << 62
    """Elements of which partial sums are taken at a time, at most."""
    nbytes: int = 0
    """Of all windows and all partial sums together."""


@dataclass(frozen=True)
class Allocation:
    """How the memory is divided, and how each job is handled within it."""

    budget: Budget
    """Of the buffers: what else is needed is in its reserve."""
    statistics: StatisticsMemory
    work: tuple[Work, ...]


def asked_together(rounds: Sequence[Sequence[Statistic[Any]]]) -> tuple[int, int, int]:
    """Return `ranks`, `partials` and `kept` of `Needs`."""
    ranks = max((sum(statistic.cost.windows for statistic in one) for one in rounds), default=0)
    partials = max((sum(statistic.cost.partials for statistic in one) for one in rounds), default=0)
    last = max((i for i, one in enumerate(rounds) if one[0].extent == Extent.MODEL), default=0)
    return ranks, partials, sum(len(one) for one in rounds[:last] if one[0].extent == Extent.TENSOR)


def statistics_memory(ranks: int, partials: int, largest: int, budget: Budget) -> StatisticsMemory:
    """Return the room for statistics.

    A window is counted by every worker on its own and added up once for each rank. The partial sums of a piece wait
    for those of all before it, of which two for each worker are in flight, and one more is summed by each.

    Parameters
    ----------
    ranks, partials
        As in `Needs`, over all jobs.
    largest
        Elements of the largest scope that is ranked.
    budget
        Before statistics are taken off.
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
    """Return an upper bound of what lists of tensors take, from the headers to the manifest.

    Parameters
    ----------
    n_refs, n_stored
        Tensors of all inputs together, and of all Fisher stores.
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
        Of the process alone.
    lists
        Bytes of lists of tensors.
    plan_work
        Decides how one job is handled; raises `TooLarge`.
    beside
        Bytes that the statistics of a job take beside buffers and windows, handled so.

    Raises
    ------
    BudgetError
        If it does not fit. The memory that the message asks for is enough.
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
        raise BudgetError(
            f"--memory {format_size(budget.total)} is too little: the process itself needs "
            f"{format_size(budget.reserve)}, lists of {len(jobs)} tensors and their inputs {format_size(lists)}, "
            f"statistics {format_size(error.statistics)}, buffers {format_size(SMALLEST_CAPACITY)}; "
            f"give at least {format_at_least(least)}"
        ) from None


class TooLittle(Exception):
    """The buffers would have less than they need at least."""

    def __init__(self, least: int, statistics: int) -> None:
        self.least, self.statistics = least, statistics


def least_total(budget: Budget, known: int, divide: Callable[[Budget], Allocation]) -> int:
    """Return the least memory, in whole MiB, that is found to be enough; it is more than is `known` to be needed."""
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
    budget = _with_buffers(budget, lists, 0)
    ranks = max((need.ranks for need in needs), default=0)
    partials = max((need.partials for need in needs), default=0)
    statistics = statistics_memory(
        ranks, partials, sum(job.n_elements for job in jobs if job.kind == "merge"), budget
    )
    extra = 0
    while True:  # the less is left for buffers, the more tensors are streamed for their statistics
        left = _with_buffers(budget, statistics.nbytes + extra, statistics.nbytes + extra)
        work = _work_of(jobs, needs, left, plan_work)
        wanted = max(map(beside, jobs, needs, work), default=0)
        if wanted <= extra:
            return Allocation(left, statistics, tuple(work))
        extra = wanted


def _with_buffers(budget: Budget, nbytes: int, statistics: int) -> Budget:
    left = budget.less(nbytes)
    if left is not budget and left.capacity < SMALLEST_CAPACITY:
        raise TooLittle(left.reserve + SMALLEST_CAPACITY, statistics)
    return left


def _work_of(
    jobs: Sequence[Job],
    needs: Sequence[Needs],
    budget: Budget,
    plan_work: Callable[[Job, Needs, Budget], Work],
) -> list[Work]:
    """Return how each job is handled; of those that do not fit, refuse the most demanding."""
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
            known[key] = same.setdefault(how, how)  # one object for all: there may be many tensors
        work.append(known[key])
    if refused is not None:
        raise refused
    return work


def _likeness(job: Job, need: Needs) -> tuple[object, ...]:
    """Return what decides how a job is handled: those that share it are handled alike."""
    fishers = tuple((ref.dtype, getattr(ref, "chunk", None)) for ref in job.fishers)
    inputs = tuple((ref.dtype, ref.scratch_bytes) for ref in job.inputs)
    return (
        job.kind,
        job.dtype,
        job.shape,
        inputs,
        fishers,
        need.access,
        need.holds,
        need.sums,
        need.extent,
        bool(job.grams),
    )
