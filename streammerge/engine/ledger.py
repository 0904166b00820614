"""The finished elements of an output: what earlier runs have written, and what this one adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from streammerge.output.journal import Receipt
from streammerge.planning.job import Job
from streammerge.planning.schedule import Interval, remaining


class Ledger:
    """The receipts of one output.

    Parameters
    ----------
    jobs
        The jobs of its plan.
    receipts
        The receipts of earlier runs.
    """

    def __init__(self, jobs: Sequence[Job], receipts: Sequence[Receipt]) -> None:
        self.receipts = list(receipts)
        """The receipts of finished elements that are durable."""
        self.elements_done = 0
        """Number of finished elements."""
        self.done: dict[int, list[Interval]] = {}
        """The elements that earlier runs finished, by the ordinal of their job."""
        self._left = [job.n_elements for job in jobs]
        for receipt in receipts:
            self.elements_done += receipt.stop - receipt.start
            self._left[receipt.job] -= receipt.stop - receipt.start
            self.done.setdefault(receipt.job, []).append((receipt.start, receipt.stop))
        self.tensors_left = sum(left > 0 for left in self._left)
        """Number of tensors that are not finished."""

    def left(self, jobs: Sequence[Job]) -> dict[int, list[Interval]]:
        """Return what earlier runs left of the jobs that they began."""
        return {job: remaining(jobs[job].n_elements, done) for job, done in self.done.items()}

    def take(self, receipt: Receipt) -> tuple[bool, bool]:
        """Count written elements; return whether their tensor is finished, and whether it just became so."""
        n, before = receipt.stop - receipt.start, self._left[receipt.job]
        self.elements_done += n
        self._left[receipt.job] = before - n
        finished, new = before - n <= 0, before > 0 >= before - n
        self.tensors_left -= new
        return finished, new


def done_by_all(jobs: Sequence[Job], ledgers: Sequence[Ledger]) -> Mapping[int, Sequence[Interval]]:
    """Return the elements that earlier runs finished in every output, by the ordinal of their job.

    Where one output has elements that a different one lacks, an empty interval marks each end of them: pieces are cut
    there, so that an output lacks either all of a piece or nothing of it.
    """
    if len(ledgers) == 1:
        return ledgers[0].done
    found: dict[int, list[Interval]] = {}
    for job in {job for ledger in ledgers for job in ledger.done}:
        n = jobs[job].n_elements
        gaps = [gap for ledger in ledgers for gap in remaining(n, ledger.done.get(job, ()))]
        found[job] = [*remaining(n, gaps), *((end, end) for gap in gaps for end in gap)]
    return found
