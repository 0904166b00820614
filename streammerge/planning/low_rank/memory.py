"""The memory in which the factors of a weight are computed, and the rows that are held in it."""

from __future__ import annotations

from streammerge.algebra.extent import Extent
from streammerge.algebra.low_rank import block_rows, held_bytes, is_dense
from streammerge.checkpoint.refs.difference import SumOfProductsRef
from streammerge.planning.job import Job
from streammerge.planning.memory.budget import Budget
from streammerge.planning.schedule import TooLarge, Work
from streammerge.tensors.encoders.low_rank import LowRank

RESERVE = 48 << 20
"""Bytes of the process for scipy's and BLAS's code and buffers."""
_AFTER_GRAM = 3
"""Passes after that for the Gram matrix: two of subspace iteration, one for the residual."""
_FEWEST_READS = 4
"""A matrix with fewer rows than columns holds at least this part of its rows, if there is room: it is read less often."""


def work_of_factors(job: Job, budget: Budget) -> Work:
    """Return how a job of factors is handled: in so little memory that all threads have work, or else in all there is.

    Raises
    ------
    TooLarge
        If the Gram matrix of the smaller side does not fit.
    """
    form, ref = job.encoder, job.sources[0]
    assert isinstance(form, LowRank)
    rows, columns = form.matrix
    beside = ref.scratch_bytes + 3 * sum(part.nbytes for part in form.parts) + (1 << 16)
    if isinstance(ref, SumOfProductsRef):
        needed = beside + 8 * (
            6 * ref.rank * (rows + columns) + 8 * ref.rank**2 + 2 * block_rows(columns) * columns
        )
        return _work(job, needed, 0, budget)
    step = block_rows(columns)
    least = rows if ref.is_whole else min(rows, step)
    wanted = [rows] if ref.is_whole else [rows, *([-(-rows // _FEWEST_READS)] if rows < columns else [0])]

    def needs(held: int) -> int:
        return beside + held_bytes(form.matrix, form.computed, held)

    for share in range(budget.threads, 0, -1):
        for held in wanted:
            if needs(held) <= budget.capacity // share:
                return _work(job, needs(held), held * columns, budget)
    room = (budget.capacity - needs(0)) // (8 * columns) // step * step
    held = max(least, room)
    return _work(job, needs(held), held * columns, budget)


def passes_over(job: Job, work: Work) -> float:
    """Return how often the rows of a weight's change are read for its factors, at most."""
    form, ref = job.encoder, job.sources[0]
    assert isinstance(form, LowRank)
    rows, columns = form.matrix
    if (
        isinstance(ref, SumOfProductsRef)
        or work.at_once == rows * columns
        or is_dense(form.matrix, form.computed)
    ):
        return 1.0
    of_gram = 1.0
    if rows < columns:
        held = max(1, (work.at_once or 0) // columns)
        of_gram = (1 + -(-rows // held)) / 2
    return of_gram + _AFTER_GRAM


def _work(job: Job, needed: int, held: int, budget: Budget) -> Work:
    n = max(1, job.n_elements)
    if needed > budget.capacity:
        what = "the Gram matrix of its smaller side and its factors"
        raise TooLarge(job.name, what, needed, budget)
    return Work("resident", n, needed / n, 1 << 12, Extent.TENSOR, held)
