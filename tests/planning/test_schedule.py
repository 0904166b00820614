"""The schedule: pieces tile tensors within the memory; what is too large is streamed, or refused with its cure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.algebra.extent import Extent
from streammerge.api import plan
from streammerge.dtypes import FLOATS
from streammerge.errors import BudgetError
from streammerge.planning.job import Job
from streammerge.planning.memory.budget import MIB, SMALLEST_CAPACITY, Budget
from streammerge.planning.memory.buffers import alignment_bytes
from streammerge.planning.schedule import (
    ALIGN,
    Chunk,
    Piece,
    StatisticsPass,
    Work,
    plan_work,
    remaining,
    steps,
    streamed_pieces,
)
from tests.conftest import config_for
from tests.planning.jobs import make_job


def no_workspace(job: Job, n: int) -> int:
    return 0


SHAPE = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 3_000_000)),
    st.tuples(st.integers(0, 3000), st.integers(0, 3000)),
)


MERGE = st.builds(
    lambda shape, n, dtype, out, base: (
        {"shape": shape, "n_models": n, "dtype": dtype, "out": out, "has_base": base}
    ),
    SHAPE,
    st.integers(1, 6),
    st.sampled_from(sorted(FLOATS)),
    st.sampled_from([None, *sorted(FLOATS)]),
    st.booleans(),
)


OTHER = st.builds(
    lambda shape, kind, dtype: {
        "shape": shape,
        "kind": kind,
        "dtype": dtype,
        "n_models": 1 if kind == "copy" else 3,
        "has_base": False,
    },
    SHAPE,
    st.sampled_from(["copy", "agree"]),
    st.sampled_from(["I64", "BOOL", "U8", "BF16"]),
)


ACCESS = st.sampled_from([Extent.ELEMENT, Extent.ROW, Extent.TENSOR, Extent.MODEL])


BUDGET = st.builds(
    lambda capacity, threads: Budget(capacity + 100 * MIB, 100 * MIB, threads),
    st.integers(SMALLEST_CAPACITY, 256 * MIB),
    st.integers(1, 64),
)


def arrange(
    descriptions: Sequence[tuple[dict[str, Any], Extent]], budget: Budget
) -> tuple[list[Job], list[Work]]:
    jobs, work = [], []
    for description, access in descriptions:
        job = make_job(len(jobs), **description)
        jobs.append(job)
        if access is Extent.ROW and job.row_length * 8 * (len(job.inputs) + 1) > budget.capacity:
            access = Extent.ELEMENT  # a row may not fit
        extent: Extent = Extent.ROW if access is Extent.ROW else Extent.ELEMENT
        holds = access in (Extent.TENSOR, Extent.MODEL)
        work.append(plan_work(job, extent, budget, workspace=no_workspace, holds=holds))
    return jobs, work


def covered(pieces: Sequence[Piece], n: int) -> np.ndarray:
    counts = np.zeros(n + 1, np.int64)
    for piece in pieces:
        counts[piece.start] += 1
        counts[piece.stop] -= 1
    return np.cumsum(counts)[:n]


@given(st.lists(st.tuples(st.one_of(MERGE, OTHER), ACCESS), min_size=1, max_size=8), BUDGET)
@settings(max_examples=150, deadline=None)
def test_pieces_tile_every_job_once_in_order_within_the_memory(
    descriptions: list[tuple[dict[str, Any], Extent]], budget: Budget
) -> None:
    jobs, work = arrange(descriptions, budget)
    found = list(steps(jobs, work, budget, {}))
    chunks = [step for step in found if isinstance(step, Chunk)]
    pieces = [piece for chunk in chunks for piece in chunk.pieces]
    assert all(chunk.nbytes <= budget.capacity for chunk in chunks)
    assert all(chunk.pieces for chunk in chunks)
    assert [(p.job, p.start) for p in pieces] == sorted((p.job, p.start) for p in pieces)
    for job, how in zip(jobs, work, strict=True):
        own = [piece for piece in pieces if piece.job == job.ordinal]
        assert own, "every tensor needs a receipt, an empty one too"
        assert own[0].start == 0
        assert own[-1].stop == job.n_elements
        assert all(a.stop == b.start for a, b in pairwise(own))
        assert all(p.stop > p.start for p in own) or job.n_elements == 0
        assert all(p.start % how.row == 0 for p in own)
        assert how.row in (ALIGN, job.row_length)
        if how.mode == "resident":
            assert len(own) == 1


@given(st.lists(st.tuples(MERGE, ACCESS), min_size=1, max_size=5), BUDGET)
@settings(max_examples=60, deadline=None)
def test_a_tensor_too_large_to_hold_is_streamed_once_before_its_pieces(
    descriptions: list[tuple[dict[str, Any], Extent]], budget: Budget
) -> None:
    jobs, work = arrange(descriptions, budget)
    found = list(steps(jobs, work, budget, {}))
    seen: list[int] = []
    for step in found:
        if isinstance(step, StatisticsPass):
            assert step.job not in seen
            seen.append(step.job)
        else:
            assert not any(work[p.job].mode == "streamed" and p.job not in seen for p in step.pieces)
    for job, how in zip(jobs, work, strict=True):
        assert (how.mode == "streamed") == (job.ordinal in seen)
        if how.mode == "streamed":
            assert job.n_elements * how.bytes_per_element > budget.resident_limit
            passes = list(streamed_pieces(job, how, budget, 0, job.n_elements, 1 << 20))
            assert (covered(passes, job.n_elements) == 1).all()
            assert all(p.start % ALIGN == 0 for p in passes)
            assert all(p.stop - p.start <= max(1 << 20, how.row) for p in passes)
            assert all(how.lease_bytes(p.stop - p.start) <= budget.capacity for p in passes)


@given(
    st.lists(st.tuples(st.one_of(MERGE, OTHER), ACCESS), min_size=1, max_size=5),
    BUDGET,
    BUDGET,
    st.randoms(use_true_random=False),
    st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_what_is_done_is_not_done_again_even_with_another_budget(
    descriptions: list[tuple[dict[str, Any], Extent]],
    first: Budget,
    second: Budget,
    random: Any,
    share: float,
) -> None:
    jobs, work = arrange(descriptions, first)
    everything = [p for s in steps(jobs, work, first, {}) if isinstance(s, Chunk) for p in s.pieces]
    done: dict[int, list[tuple[int, int]]] = {}
    for piece in everything:
        if random.random() < share:
            done.setdefault(piece.job, []).append((piece.start, piece.stop))
    jobs, work = arrange(descriptions, second)
    rest = [p for s in steps(jobs, work, second, done) if isinstance(s, Chunk) for p in s.pieces]
    for job in jobs:
        old = [Piece(job.ordinal, *interval) for interval in done.get(job.ordinal, ())]
        new = [p for p in rest if p.job == job.ordinal]
        held_whole = work[job.ordinal].mode == "resident" and len(new) == 1 and new[0].stop == job.n_elements
        if job.n_elements == 0:
            assert len(new) == 1
        elif not held_whole:
            assert (covered([*old, *new], job.n_elements) == 1).all()
        else:
            assert (covered(old, job.n_elements) == 0).any(), "it was finished"


def test_all_done_means_no_steps_but_empty_tensors() -> None:
    budget = Budget(200 * MIB, 100 * MIB, 2)
    descriptions: list[tuple[dict[str, Any], Extent]] = [
        ({"shape": (100, 100)}, Extent.TENSOR),
        ({"shape": (7,)}, Extent.ELEMENT),
    ]
    jobs, work = arrange(descriptions, budget)
    assert list(steps(jobs, work, budget, {0: [(0, 10_000)], 1: [(0, 3), (3, 7)]})) == []
    assert list(steps(jobs, work, budget, {0: [(0, 10_000)]})) == [
        Chunk((Piece(1, 0, 7),), 42 + alignment_bytes(jobs[1]))
    ]


@given(st.integers(0, 200), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=8))
def test_remaining_is_the_complement(n: int, intervals: list[tuple[int, int]]) -> None:
    clipped = [(min(a, b, n), min(max(a, b), n)) for a, b in intervals]
    done = [(a, b) for a, b in clipped if a < b]
    gaps = remaining(n, done)
    finished = {e for a, b in done for e in range(a, b)}
    assert [e for a, b in gaps for e in range(a, b)] == [e for e in range(n) if e not in finished]
    assert all(a < b for a, b in gaps)
    assert all(x[1] < y[0] for x, y in pairwise(gaps))


def test_a_row_method_is_cut_between_rows_and_refused_where_a_row_does_not_fit() -> None:
    budget = Budget(124 * MIB, 100 * MIB, 2)
    job = make_job(0, (1000, 999), dtype="F32")
    work = plan_work(job, Extent.ROW, budget, workspace=no_workspace, holds=False)
    assert work.row == 999
    pieces = [p for s in steps([job], [work], budget, {}) if isinstance(s, Chunk) for p in s.pieces]
    assert len(pieces) > 1
    assert all(p.start % 999 == 0 and p.stop % 999 == 0 for p in pieces)
    wide = make_job(0, (2, 3_000_000), dtype="F32")
    with pytest.raises(BudgetError, match=r"one row of it, .* give at least "):
        plan_work(wide, Extent.ROW, budget, workspace=no_workspace, holds=False)


def test_a_formula_of_whole_tensors_is_refused_with_the_memory_that_would_do() -> None:
    budget = Budget(124 * MIB, 100 * MIB, 2)
    job = make_job(0, (2, 3_000_000), dtype="F32")
    with pytest.raises(
        BudgetError, match=r"the whole tensor, 68.7 MiB, .* leaves 24.0 MiB: give at least 169 MiB"
    ):
        plan_work(job, Extent.TENSOR, budget, workspace=no_workspace, holds=False)
    work = plan_work(job, Extent.ELEMENT, budget, workspace=no_workspace, holds=True)
    assert work.mode == "streamed"
    large = Budget(400 * MIB, 0, 2)
    for extent, holds in ((Extent.TENSOR, False), (Extent.TENSOR, True), (Extent.ELEMENT, True)):
        how = plan_work(job, extent, large, workspace=no_workspace, holds=holds)  # type: ignore[arg-type]
        assert how.mode == "resident"


def test_rows_with_statistics_of_the_whole_tensor_before_them_are_held_or_cut_at_rows_and_blocks() -> None:
    job = make_job(0, (8192, 96), dtype="F32")
    large, small = Budget(400 * MIB, 0, 2), Budget(2 * MIB, 0, 2)
    assert plan_work(job, Extent.ROW, large, workspace=no_workspace, holds=True).mode == "resident"
    work = plan_work(job, Extent.ROW, small, workspace=no_workspace, holds=True)
    assert (work.mode, work.row) == ("streamed", 3 * 4096)


def test_columns_are_cut_at_as_many_rows_as_are_summed_at_once_and_at_blocks_only_for_other_sums() -> None:
    large, small = Budget(400 * MIB, 0, 2), Budget(6 * MIB, 0, 2)
    job = make_job(0, (8192, 3, 33), dtype="F32")
    assert job.line_length(Extent.COLUMN) == 99
    assert plan_work(job, Extent.COLUMN, large, workspace=no_workspace, holds=True).mode == "resident"
    work = plan_work(job, Extent.COLUMN, small, workspace=no_workspace, holds=True, sums=False)
    assert (work.mode, work.row) == ("streamed", 64 * 99)
    assert plan_work(job, Extent.COLUMN, small, workspace=no_workspace, holds=True).row == 64 * 64 * 99
    wide = make_job(0, (5, 3 << 20), dtype="BF16")
    assert (
        plan_work(wide, Extent.COLUMN, large, workspace=no_workspace, holds=True, sums=False).row == 3 << 20
    )
    for shape, columns in (((), 1), ((7,), 1), ((0, 4), 1)):
        assert make_job(0, shape).line_length(Extent.COLUMN) == columns


def test_what_is_kept_of_every_row_or_column_counts_as_memory(make_models: Callable[..., list[Path]]) -> None:
    """A tensor of two rows has as many columns as half of its elements: their dot products outweigh it."""
    paths = make_models(n_models=2, dtype=torch.float32, shapes={"w": (2, 1 << 20)})
    parameters = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    config = config_for("nuslerp", paths, parameters=parameters)
    with pytest.raises(BudgetError, match=r"this method holds 1 rows of it, 4\d\d MiB"):
        plan(config, memory="512MiB", threads=1)
    with pytest.raises(
        BudgetError, match="give at least"
    ):  # streamed, as much again is kept beside its pieces
        plan(config, memory="1GiB", threads=1)
    how = plan(config, memory="1200MiB", threads=1).work[-1]
    assert how.mode == "resident"
    assert how.workspace >= 8 * 51 << 20
    by_rows = config_for(
        "nuslerp", make_models(shapes={"w": (1 << 16, 1)}), parameters={"nuslerp_flatten": False}
    )
    assert plan(by_rows, memory="1GiB", threads=1).work[-1].bytes_per_element >= 3 * 2 + 8 * 51
