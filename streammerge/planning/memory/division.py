"""How the memory of a merge is divided, and what other amounts of it would do: the least, and what streams nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streammerge.algebra.extent import Extent
from streammerge.methods.registry import Method
from streammerge.planning.job import Job
from streammerge.planning.memory.allocate import Allocation, Needs, TooLittle, allocate, divide, least_total
from streammerge.planning.memory.budget import MIB, SMALLEST_CAPACITY, Budget
from streammerge.planning.schedule import PASSES_AHEAD, TooLarge, Work, plan_work

BLOCK_ELEMENTS = 1 << 16
"""Elements a torch formula works on at a time on the CPU, where it may be cut anywhere."""
_MOST_MEMORY = 1 << 46
"""Bytes; more than this is nobody's."""


@dataclass(frozen=True)
class Division:
    """What the memory is divided by."""

    budget: Budget
    """Of the process alone, before lists and statistics are taken off."""
    jobs: tuple[Job, ...]
    needs: tuple[Needs, ...]
    """Of each job."""
    lists: int
    """Bytes of lists of tensors."""
    method: Method
    on_host: bool
    """Whether temporaries lie in this process's memory, and not in a GPU's."""
    torch_only: bool

    def allocate(self) -> Allocation:
        """Divide the memory that was given.

        Raises
        ------
        BudgetError
            If it does not fit. The memory that the message asks for is enough.
        """
        return allocate(self.budget, self.jobs, self.needs, self.lists, self._work_of, _kept_of_columns)

    def least(self) -> int:
        """Return the least memory, in bytes, that is found to be enough."""
        return least_total(self.budget, self.budget.reserve + SMALLEST_CAPACITY, self._divide)

    def least_unstreamed(self) -> int | None:
        """Return the memory, in bytes, from which no tensor is streamed for its own statistics; None: beyond reason."""
        low, high = self.least() // MIB, 0
        if not self._streams(low * MIB):
            return low * MIB
        high = low
        while self._streams(high * MIB):
            low, high = high, 2 * high
            if high * MIB > _MOST_MEMORY:
                return None
        while high - low > max(1, low >> 7):
            middle = (low + high) // 2
            low, high = (middle, high) if self._streams(middle * MIB) else (low, middle)
        return high * MIB

    def _streams(self, total: int) -> bool:
        try:
            allocation = self._divide(Budget(total, self.budget.reserve, self.budget.threads))
        except (TooLarge, TooLittle):
            return True
        return any(work.mode == "streamed" for work in allocation.work)

    def _divide(self, budget: Budget) -> Allocation:
        return divide(budget, self.jobs, self.needs, self.lists, self._work_of, _kept_of_columns)

    def _work_of(self, job: Job, need: Needs, budget: Budget) -> Work:
        in_torch = self.on_host and (self.torch_only or runs_in_torch(job, self.method))
        return plan_work(
            job,
            need.extent,
            budget,
            workspace=_workspace(need.extent, in_torch=in_torch),
            holds=need.holds,
            sums=need.sums,
            row_bytes=_kept_of_a_row(job),
        )


def _kept_of_columns(job: Job, need: Needs, work: Work) -> int:
    """Return the bytes that are kept of the columns of a tensor whose statistics are streamed, beside its pieces.

    While it is surveyed: the dot products, and what their coefficients are computed by. Until it is merged: the dot
    products, of as many tensors as are surveyed ahead and of the one that is merging.
    """
    if work.mode != "streamed" or need.extent != Extent.COLUMN:
        return 0
    k = len(job.inputs)
    answers = (PASSES_AHEAD + 1) * 8 * (k * (k + 1) // 2)
    return (_kept_of_a_row(job) + answers) * job.line_length(Extent.COLUMN)


def runs_in_torch(job: Job, method: Method) -> bool:
    """Return whether a job's arithmetic is done by torch on the CPU: plain formulas, and fp64."""
    if job.kind == "merge":
        wide = any(ref.dtype == "F64" for ref in (*job.inputs, *job.fishers))
        return bool(job.grams) or method.is_formula or wide or job.dtype == "F64"
    return job.dtype != job.sources[0].dtype and "F64" in (job.dtype, job.sources[0].dtype)


def torch_workspace(job: Job, n: int) -> int:
    """Return an upper bound of the temporaries of a formula on a block of `n` elements, in bytes."""
    block = max(n, min(BLOCK_ELEMENTS, job.n_elements))
    return block * 8 * (2 * len(job.inputs) + 3 * len(job.fishers) + 12) + job.mixer_bytes


def _workspace(extent: Extent, *, in_torch: bool) -> Callable[[Job, int], int]:
    """Return what bounds the temporaries, in bytes, of the kernels or of torch on blocks of some elements of a job."""

    def beside(job: Job, n: int) -> int:
        pairs = _kept_of_a_row(job) * job.line_length(extent) if extent == Extent.COLUMN else 0
        if in_torch:  # of columns, a row at a time will do
            return pairs + torch_workspace(job, job.line_length(extent) if extent == Extent.COLUMN else n)
        return pairs + (72 * job.row_length if extent == Extent.ROW else 0)

    return beside


def _kept_of_a_row(job: Job) -> int:
    """Return an upper bound of the bytes kept of one row or column: dot products of its vectors, and their weights."""
    k = len(job.inputs)
    return 8 * (k * (k + 1) // 2 + 5 * k * k)
