"""Divide the memory of a merge; find the least amount that suffices, and the amount that avoids streaming."""

from __future__ import annotations

from dataclasses import replace

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules.matrix_merge import widening_bytes
from streammerge.backends.base import Backend
from streammerge.backends.torch.backend import BLOCK_ELEMENTS
from streammerge.methods.registry import Method
from streammerge.planning.backend import backend_of
from streammerge.planning.job import Job
from streammerge.planning.low_rank.memory import work_of_factors
from streammerge.planning.memory.allocate import Allocation, Needs, TooLittle, allocate, divide, least_total
from streammerge.planning.memory.budget import MIB, SMALLEST_CAPACITY, Budget
from streammerge.planning.needs import tensor_context_of
from streammerge.planning.on_device import goes_to_device, is_fused
from streammerge.planning.schedule import PASSES_AHEAD, TooLarge, Work, plan_work
from streammerge.planning.settling import can_settle
from streammerge.records import dataclass

_MOST_MEMORY = 1 << 46
"""Bytes; more memory than any machine has."""


@dataclass(frozen=True)
class Division:
    """The memory of a merge, and everything that shares it."""

    budget: Budget
    """The memory before lists and statistics are subtracted."""
    jobs: tuple[Job, ...]
    needs: tuple[Needs, ...]
    """The needs of each job."""
    lists: int
    """Size of lists of tensors in bytes."""
    method: Method
    backend: Backend
    others: tuple[tuple[Job, ...], ...] = ()
    """The jobs of further outputs that are made from the same reads; they differ only in their parameters."""
    in_order: bool = False
    """Whether tensors are merged in the order of their bytes in the output."""

    def allocate(self) -> Allocation:
        """Divide the given memory.

        Raises
        ------
        BudgetError
            If it does not fit. The memory that the message asks for suffices.
        """
        return allocate(self.budget, self.jobs, self.needs, self.lists, self._work_of, self._kept_of_columns)

    def least(self) -> int:
        """Return the least memory, in bytes, that suffices."""
        return least_total(self.budget, self.budget.reserve + SMALLEST_CAPACITY, self._divide)

    def least_unstreamed(self) -> int | None:
        """Return the least memory, in bytes, with which no tensor is streamed for its own statistics; None: too much."""
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
        return any(work.reads_twice for work in allocation.work)

    def _divide(self, budget: Budget) -> Allocation:
        return divide(budget, self.jobs, self.needs, self.lists, self._work_of, self._kept_of_columns)

    def _work_of(self, job: Job, need: Needs, budget: Budget) -> Work:
        if job.kind == "factor":
            return work_of_factors(job, budget)
        backend = backend_of(job, self.method, self.backend)

        def workspace(job: Job, n: int) -> int:
            if job.matrix is not None:
                return _declared(job, n, self.method, backend) + widening_bytes(job.matrix_elements)
            pairs = _kept_of_a_row(job) * job.line_length(need.extent) if need.extent == Extent.COLUMN else 0
            own = (job, *(jobs[job.ordinal] for jobs in self.others))
            declared = max(_declared(one, n, self.method, backend) for one in own)
            return pairs + backend.workspace(job, n, need.extent) + declared

        work = plan_work(
            job,
            need.extent,
            budget,
            workspace=workspace,
            holds=need.holds,
            sums=need.sums,
            row_bytes=_kept_of_a_row(job),
            tiled=backend.compiled,
        )
        if backend.open_lane is not None and self._lives_on_device(job, need.extent, backend):
            return replace(work, mode="resident" if work.mode == "streamed" else work.mode, on_device=True)
        alone = not self.others and not self.in_order
        if work.mode == "streamed" and need.settles and backend.settles and alone:
            return replace(work, settles=can_settle(job, work, budget))
        return work

    def _lives_on_device(self, job: Job, extent: Extent, backend: Backend) -> bool:
        """Return whether all that a job reads goes to a device as it is, and all that it computes is computed there."""
        own = (job, *(jobs[job.ordinal] for jobs in self.others))
        return goes_to_device(job, extent) and all(is_fused(one, self.method, backend) for one in own)

    def _kept_of_columns(self, job: Job, need: Needs, work: Work) -> int:
        """Return the bytes kept for the columns of a streamed tensor, in addition to its pieces.

        During the pass these are the dot products, and the matrices from which the coefficients are solved. After it the
        dot products stay until the tensor is merged; several tensors may wait (`PASSES_AHEAD`) while one merges.
        """
        if work.mode != "streamed" or need.extent != Extent.COLUMN:
            return 0
        k = len(job.inputs)
        answers = (PASSES_AHEAD + 1) * 8 * (k * (k + 1) // 2)
        of_all = (len(self.others) + 1) * (_kept_of_a_row(job) + answers)
        return of_all * job.line_length(Extent.COLUMN)


def _declared(job: Job, n: int, method: Method, backend: Backend) -> int:
    """Return the workspace that a formula declares for a piece of `n` elements, in bytes; 0 if it is device memory."""
    if job.kind != "merge" or not backend.on_host:
        return 0
    block = max(n, min(BLOCK_ELEMENTS, job.n_elements))
    return method.workspace_bytes(tensor_context_of(job), block)


def _kept_of_a_row(job: Job) -> int:
    """Return an upper bound of the bytes kept per row or column: dot products of its vectors, and their weights."""
    k = len(job.inputs)
    return 8 * (k * (k + 1) // 2 + 5 * k * k)
