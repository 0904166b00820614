"""Which tensors are merged while their thresholds are counted, so that they are read once without being held.

Statistics of a tensor come before its merge, so a tensor that does not fit in memory is read twice. If all that its rule
waits for are thresholds, a sample tells between which values they lie, and then most elements are decided. They are merged
in the same pass that counts; only the results are held, and the few undecided elements as they were read::

    one lease  |-- results --|-- undecided elements --|-- piece --|-- piece --| ...

The lease is taken before the pass begins, so that it never waits for memory while it holds some.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from streammerge.algebra.brackets import Edge, find_edges, same_cuts_aside
from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import Rule, TaskVectorMerge, ranked
from streammerge.algebra.task_vectors import TaskVector
from streammerge.dtypes import itemsize
from streammerge.io.pages import PAGE
from streammerge.methods.registry import Method
from streammerge.methods.tensor_context import TensorContext
from streammerge.planning.job import Job
from streammerge.planning.memory.budget import MIB, Budget
from streammerge.planning.schedule import Work
from streammerge.records import dataclass
from streammerge.statistics.base import Statistic
from streammerge.statistics.ranks import Rank, Threshold
from streammerge.statistics.ties import TieIndex

UNDECIDED = (16, 32)
"""Room is for one undecided element in the first number, or in the second; usually there is one in a hundred."""
MOST_OF_PIECE = 8
"""At most one element in this number of a piece may be undecided."""
_PIECE_BYTES = 24 * MIB
_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Room:
    """The division of the lease of one tensor. All parts begin at whole pages."""

    results: int
    """Bytes for the merged elements, and a page to match the offset within the file's page."""
    aside: int
    """Bytes for undecided elements: the place, the base and the models, as read."""
    piece: int
    """Elements of a piece."""
    slot: int
    """Bytes of the buffer of a piece: its inputs, and a mark for each element."""
    slots: int
    """Number of pieces in memory at a time."""

    @property
    def nbytes(self) -> int:
        """Size of the lease."""
        return self.results + self.aside + self.slots * self.slot


def undecided_bytes(job: Job) -> int:
    """Return the bytes that an undecided element takes: its place within the piece, and its values."""
    return 4 + sum(itemsize(ref.dtype) for ref in job.inputs)


def room_of(job: Job, work: Work, budget: Budget) -> Room | None:
    """Return the division of memory for a job; None if there is not enough."""
    results = _pages(job.n_elements * itemsize(job.dtype)) + PAGE
    for undecided in UNDECIDED:
        aside = _pages(job.n_elements // undecided * undecided_bytes(job))
        left = budget.capacity - results - aside
        for slots in (budget.workers, budget.threads + 1, 2):
            size = min(_PIECE_BYTES, left // slots) - work.workspace - 3 * PAGE
            rows = int(size / (work.bytes_per_element + 2)) // work.row
            least = 0 if (slots, undecided) == (2, UNDECIDED[-1]) else _PIECE_BYTES // 4
            if rows > 0 and size >= least:
                piece = min(rows, -(-job.n_elements // work.row)) * work.row
                # Twice the marks: the undecided places, as they are found, take as much.
                slot = _pages(work.lease_bytes(piece)) + 2 * _pages(piece)
                return Room(results, aside, piece, slot, slots)
    return None


def can_settle(job: Job, work: Work, budget: Budget) -> bool:
    """Return whether a streamed job whose rule waits for thresholds alone can be merged in one pass."""
    plain = job.kind == "merge" and job.encoder is None and job.outputs_at_once == 1 and not job.keeps_inputs
    same = job.computed_dtype == job.dtype and all(ref.dtype in _DTYPES for ref in job.inputs)
    whole = not job.fishers and not job.shared and not job.has_stages and not job.waits
    return (
        plain and same and whole and work.extent == Extent.ELEMENT and room_of(job, work, budget) is not None
    )


def edges_of(
    method: Method, context: TensorContext, parameters: Mapping[str, Any]
) -> tuple[tuple[Edge, ...], list[Statistic[Any]], bool] | None:
    """Return the cuts of a method's rule, the thresholds it asks for, and whether it asks for the last kept tie of each.

    None: it asks for anything else, or more.
    """
    rounds = method.rounds(context, parameters)
    by_index = len(rounds) == 2
    if not rounds or len(rounds) > 2 or any(one.extent != Extent.TENSOR for some in rounds for one in some):
        return None
    if not all(isinstance(one, Rank) for one in rounds[0]):
        return None
    if by_index and not all(isinstance(one, TieIndex) for one in rounds[1]):
        return None
    keys = list(range(1, len(rounds[0]) + 1))

    def ruled(first: int) -> Rule | list[Statistic[Any]]:
        thresholds = [Threshold(first + key, 1, first % 2) for key in keys]
        ends = [(context.ordinal, first + key) for key in keys]
        answers: list[list[Any]] = [thresholds, ends]
        return method.start(context, parameters, answers[: len(rounds)])

    rule, other = ruled(0), ruled(len(keys) + 1)
    if not isinstance(rule, TaskVectorMerge) or not isinstance(other, TaskVectorMerge) or ranked(rule):
        return None
    edges = find_edges(rule, keys)
    if edges is None or not same_cuts_aside(rule, other):
        return None
    asked = [getattr(one, "ranked", None) for one in rounds[0]]
    for edge in edges:
        vector, cut = rule.vectors[edge.vector], edge.cut_of(rule)
        if vector.model != edge.vector or asked[edge.statistic] != _before_cut(vector):
            return None
        # A tie's place is looked for among undecided elements, whose drop is not drawn again.
        if (cut.ties == "index") != by_index or (by_index and (cut.limit != cut.key or vector.is_random)):
            return None
    return edges, rounds[0], by_index


def _before_cut(vector: TaskVector) -> TaskVector:
    return TaskVector(vector.model, drop=vector.drop, drop_end=vector.drop_end, shared=vector.shared)


def _pages(nbytes: float) -> int:
    return math.ceil(nbytes / PAGE) * PAGE
