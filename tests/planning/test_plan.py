"""The planner is pure: headers and numbers in, jobs, chunks and byte offsets out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streammerge.algebra.extent import Extent
from streammerge.api import merge, plan
from streammerge.dtypes import BITS, FLOATS, itemsize
from streammerge.errors import BudgetError, ConfigError, InputError, ModelError
from streammerge.formats.refs import TensorRef
from streammerge.planning.job import Job
from streammerge.planning.layout import lay_out
from streammerge.planning.memory.budget import MIB, SMALLEST_CAPACITY, Budget
from streammerge.planning.memory.buffers import alignment_bytes
from streammerge.planning.plan import MergePlan
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
from tests.conftest import config_for, read_tensors, write_model

# --- the schedule


def make_job(
    ordinal: int,
    shape: tuple[int, ...],
    n_models: int = 2,
    dtype: str = "BF16",
    kind: str = "merge",
    out: str | None = None,
    has_base: bool = True,
    name: str | None = None,
) -> Job:
    n = math.prod(shape)
    ref = TensorRef(name or f"t{ordinal}", dtype, shape, "model.safetensors", 0, n * BITS[dtype] // 8)
    return Job(
        ordinal,
        ref.name,
        out or dtype,
        shape,
        kind,
        (ref,) * n_models,  # type: ignore[arg-type]
        ref if has_base else None,
        {},
    )


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


# --- the layout

ALL_DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.complex64,
]


def tensors_of_all_dtypes() -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    tensors = {}
    for dtype in ALL_DTYPES:
        for shape in [(), (3,), (5, 7), (0, 4), (2, 1, 3)]:
            n = math.prod(shape)
            if n == 0:
                flat = torch.empty(0, dtype=dtype)
            elif dtype == torch.bool:
                flat = torch.from_numpy(rng.integers(0, 2, n).astype(bool))
            elif dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                flat = torch.from_numpy(rng.standard_normal(n)).to(dtype)
            else:
                width = torch.empty(0, dtype=dtype).element_size()
                flat = torch.from_numpy(rng.integers(0, 256, n * width, dtype=np.uint8)).view(dtype)
            name = f"é{'x' * n}.{str(dtype).removeprefix('torch.')}.{len(shape)}"
            tensors[name] = flat.reshape(shape).clone()
    return tensors


def test_a_shard_is_byte_for_byte_what_safetensors_writes_for_every_dtype(tmp_path: Path) -> None:
    model = write_model(tmp_path / "in", tensors_of_all_dtypes())
    merge({"merge_method": "passthrough", "models": [{"model": str(model)}]}, tmp_path / "out", memory="1GiB")
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (model / "model.safetensors").read_bytes()


@pytest.mark.parametrize("shard_size", [1, 100, 400, 1000])
def test_each_of_many_shards_is_what_safetensors_writes_too(shard_size: int, tmp_path: Path) -> None:
    tensors = tensors_of_all_dtypes()
    model = write_model(tmp_path / "in", tensors)
    merge(
        {"merge_method": "passthrough", "models": [{"model": str(model)}]},
        tmp_path / "out",
        memory="1GiB",
        shard_size=shard_size,
    )
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert sorted(index["weight_map"]) == sorted(tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for shard in shards:
        held = load_file(shard)
        assert {name for name, place in index["weight_map"].items() if place == shard.name} == set(held)
        assert (
            sum(t.nbytes for t in held.values()) <= shard_size
            or len([t for t in held.values() if t.nbytes]) == 1
        )
        save_file(held, tmp_path / "again.safetensors", metadata={"format": "pt"})
        assert (tmp_path / "again.safetensors").read_bytes() == shard.read_bytes()


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


@given(
    st.dictionaries(
        NAMES,
        st.tuples(
            st.sampled_from(sorted(d for d in BITS if BITS[d] >= 8)), st.lists(st.integers(0, 9), max_size=3)
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 3000),
)
@settings(max_examples=100, deadline=None)
def test_offsets_are_contiguous_and_headers_parse(
    tensors: dict[str, tuple[str, list[int]]], shard_size: int
) -> None:
    jobs = [
        make_job(i, tuple(shape), 1, dtype, "copy", has_base=False, name=name)
        for i, (name, (dtype, shape)) in enumerate(tensors.items())
    ]
    layout = lay_out(jobs, shard_size)
    assert sorted(part for shard in layout.shards for part in shard.parts) == [
        (i, 0) for i in range(len(jobs))
    ]
    for number, shard in enumerate(layout.shards):
        length = int.from_bytes(shard.header[:8], "little")
        assert len(shard.header) == 8 + length
        assert length % 8 == 0
        header = json.loads(shard.header[8:])
        assert header.pop("__metadata__") == {"format": "pt"}
        position = len(shard.header)
        for ordinal, part in shard.parts:
            job, slot = jobs[ordinal], layout.slots[ordinal][part]
            assert (slot.shard, slot.offset, slot.nbytes) == (number, position, job.output_bytes)
            begin = position - len(shard.header)
            assert header.pop(job.name) == {
                "dtype": job.dtype,
                "shape": list(job.shape),
                "data_offsets": [begin, begin + slot.nbytes],
            }
            assert slot.offset % min(8, itemsize(job.dtype)) == 0 or job.output_bytes == 0
            position += slot.nbytes
        assert header == {}
        assert shard.nbytes == position
        filled = position - len(shard.header)
        assert filled <= shard_size or sum(jobs[o].output_bytes > 0 for o, _ in shard.parts) == 1


# --- what is merged, and what is refused


def describe_dtypes(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def test_the_output_dtype_applies_to_floats_only(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models(shapes={"w": (4, 4)})
    for keys, expected in [
        ({}, "BF16"),
        ({"dtype": "float32"}, "F32"),
        ({"dtype": "float32", "out_dtype": "float16"}, "F16"),
    ]:
        decided = plan(config_for("linear", paths, **keys), memory="1GiB")
        assert {job.name: job.dtype for job in decided.jobs} == {"w": expected, "position_ids": "I64"}
        merge(config_for("linear", paths, **keys), tmp_path / expected, memory="1GiB")
        assert describe_dtypes(tmp_path / expected / "model.safetensors") == {
            "w": expected,
            "position_ids": "I64",
        }


def test_a_base_listed_among_the_models_is_not_merged_with_itself(
    make_models: Callable[..., list[Path]],
) -> None:
    paths = make_models()
    config = config_for("ties", paths, models=[{"model": str(p)} for p in paths])
    decided = plan(config, memory="1GiB")
    assert [model.reference for model in decided.models] == [str(p) for p in paths[1:]]
    assert all(job.n_models == 3 for job in decided.jobs if job.kind == "merge")


def test_excluded_tensors_are_copied_from_the_base(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models(shapes={"head.weight": (4, 4), "body.weight": (4, 4)})
    merge(config_for("linear", paths, exclude=["^head"]), tmp_path / "out", memory="1GiB")
    merged = read_tensors(tmp_path / "out")
    first = read_tensors(paths[1])
    assert torch.equal(merged["head.weight"], first["head.weight"])
    assert not torch.equal(merged["body.weight"], first["body.weight"])


def models_of(tmp_path: Path, *models: dict[str, torch.Tensor]) -> list[Path]:
    return [
        write_model(tmp_path / f"model {i}", {name: t.clone() for name, t in tensors.items()})
        for i, tensors in enumerate(models)
    ]


X = torch.ones(4, 6)
ROWS = {"a": X, "b": X}
REFUSED: list[tuple[str, list[dict[str, torch.Tensor]], str]] = [
    (
        "missing in a model",
        [ROWS, ROWS, {"a": X}],
        "model 2: tensor b is missing, .*model 0 has it; list it under `exclude:` to copy it from there",
    ),
    ("several missing", [{**ROWS, "c": X}, ROWS, {"a": X}], "model 1: tensor c is missing"),
    (
        "missing in the base",
        [{"a": X}, ROWS, ROWS],
        "model 0: tensor b is missing, all other models have it; list it under `exclude:` to leave it out",
    ),
    (
        "another vocabulary",
        [ROWS, ROWS, {"a": X, "b": torch.ones(5, 6)}],
        r"tensor b: \[5, 6\] in .*, \[4, 6\] in .*; vocabularies differ: align them with `tokenizer_source: union`",
    ),
    (
        "another shape",
        [ROWS, ROWS, {"a": X, "b": torch.ones(6, 4)}],
        r"tensor b: \[6, 4\] in .*; shapes differ: ",
    ),
    ("same count, another rank", [ROWS, ROWS, {"a": X, "b": torch.ones(24)}], r"tensor b: \[24\] in "),
    (
        "floats against integers",
        [ROWS, ROWS, {"a": X, "b": X.int()}],
        "tensor b: I32 in .*, F32 in .*; these dtypes cannot",
    ),
    (
        "integers against floats",
        [{"a": X, "b": X.int()}, ROWS, ROWS],
        "tensor b: F32 in .*, I32 in .*; these dtypes cannot",
    ),
    (
        "integers of two widths",
        [{"b": X.int()}, {"b": X.int()}, {"b": X.long()}],
        r"tensor b: integer dtypes differ \(I32, I64\); list it under `exclude:`",
    ),
    (
        "a quantised dtype",
        [{"b": X.to(torch.float8_e8m0fnu)}] * 3,
        "tensor b in .* is F8_E8M0, a quantised or complex",
    ),
    (
        "complex numbers",
        [{"b": X.to(torch.complex64)}] * 3,
        "tensor b in .* is C64, a quantised or complex dtype",
    ),
]


@pytest.mark.parametrize(("tensors", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_tensors_that_do_not_fit_are_refused_with_the_cure(
    tensors: list[dict[str, torch.Tensor]], message: str, tmp_path: Path
) -> None:
    paths = models_of(tmp_path, *tensors)
    config = config_for("ties", paths, parameters={"density": 0.5})
    with pytest.raises(ModelError, match=message) as caught:
        plan(config, memory="1GiB")
    assert "\n" not in str(caught.value)
    plan(
        {**config, "exclude": ["^b$", "^c$"]} if "a" in tensors[0] else {**config, "exclude": ["b"]},
        memory="1GiB",
    )


def test_a_tensor_that_some_models_have_beyond_the_base_is_left_out_with_a_warning(tmp_path: Path) -> None:
    paths = models_of(tmp_path, {"a": X}, ROWS, {"a": X})
    decided = plan(config_for("ties", paths), memory="1GiB")
    assert [job.name for job in decided.jobs] == ["a"]
    assert any("1 tensor that" in w and "(first: b)" in w for w in decided.warnings)


def test_float_dtypes_that_differ_are_promoted_with_a_warning(tmp_path: Path) -> None:
    paths = models_of(tmp_path, {"a": X.bfloat16()}, {"a": X}, {"a": X.half()})
    decided = plan(config_for("ties", paths), memory="1GiB")
    assert decided.jobs[0].dtype == "F32"
    assert any("1 tensors differ in dtype" in w and "(BF16, F16, F32)" in w for w in decided.warnings)


Change = Callable[[dict[str, Any]], None]


def top(**parameters: Any) -> Change:
    return lambda config: config.setdefault("parameters", {}).update(parameters)


def first(**parameters: Any) -> Change:
    return lambda config: config["models"][0].setdefault("parameters", {}).update(parameters)


def key(**keys: Any) -> Change:
    return lambda config: config.update(keys)


WRONG: list[tuple[str, str, Change, str]] = [
    ("a bool weight", "ties", top(weight=True), r"parameters\.weight: 'True' is not a number"),
    ("a bool weight of a model", "ties", first(weight=True), r"models\[0\]\.parameters\.weight: 'True' is not a number"),
    ("text as a weight", "ties", top(weight="0.5"), "'?0.5'? is not a number"),
    ("a number as a switch", "ties", top(normalize=2), r"parameters\.normalize: '2' is not true or false"),
    ("an unknown name", "ties", top(densty=0.5), "unknown parameter 'densty' of method 'ties' .did you mean 'density'"),
    ("an unknown name of a model", "ties", first(wieght=1.0),
     r"models\[0\]\.parameters\.wieght: unknown parameter .*did you mean 'weight'"),
    ("a name far from any", "linear", top(qqqq=1), "unknown parameter 'qqqq' of method 'linear' .known: weight, norm"),
    ("a weight for one model only", "ties", first(weight=0.5),
     r"models\[1\]: no weight for tensor .*, but other models have one: give a weight to all or none"),
    ("density above 1", "ties", top(density=1.5), r"parameters\.density: 1\.5 is outside the range \[0, 1\]"),
    ("density below 0", "dare_linear", first(density=-0.1), r"density: -0\.1 is outside the range \[0, 1\]"),
    ("density in percent", "ties", top(density=20), r"20 is outside the range \[0, 1\] \(a fraction: 0\.2 for 20 %\)"),
    ("no t for slerp", "slerp", lambda config: config["models"].__delitem__(slice(1, None)),
     r"^config: parameters: 't' is missing: slerp needs parameters: \{t: 0\.5\} \(0 = the base, 1 = the other model\)$"),
    ("t for some tensors", "slerp", top(t=[{"filter": "mlp", "value": 0.5}]),
     "parameters.t: no filter matches tensor .*: add `- value: …` as the last entry"),
    ("a weight with filters alone", "ties",
     lambda config: [m.update(parameters={"weight": w}) for m, w in zip(
         config["models"], [1, [{"filter": "mlp", "value": 0.5}], 1], strict=True)],
     r"models\[1\]\.parameters\.weight: no filter matches tensor .*: add `- value: …` as the last entry"),
    ("a key of the config among the parameters", "ties", top(dtype="bfloat16"),
     "parameters.dtype: 'dtype' is not a parameter: move it to the top level of the config"),
    ("no base for slerp", "slerp", lambda config: config.pop("base_model"),
     "'slerp' needs one: the first of the two models"),
    ("a choice misspelt", "ties", top(ties="thni"), "'thni' is not one of thin, all, index, drop .did you mean 'thin'"),
    ("a method in capitals", "TIES", key(), "unknown method 'TIES' .did you mean 'ties'"),
    ("a method by another name", "average", key(), "unknown method 'average' .did you mean 'linear'"),
    ("a method by the name of its paper", "model-soup", key(), "unknown method 'model-soup' .did you mean 'linear'"),
    ("a method of one's own without its file", "sign_averaging", key(),
     "unknown method 'sign_averaging' .`streammerge methods` lists them; your own methods need --methods FILE"),
    ("a gradient that leaves the range", "ties", top(density=[0.5, 1.5]), r"density: 1\.\d+ is outside the range|1\.5"),
    ("a shared parameter of one model", "ties", first(normalize=False),
     r"models\[0\]\.parameters\.normalize: 'normalize' is one value for all models: put it under `parameters:`"),
    ("lambda of one model", "task_arithmetic", first(**{"lambda": 0.5}), "'lambda' is one value for all models"),
    ("a preset of one model", "ties", first(preset="paper"), r"models\[0\]\.parameters\.preset: unknown parameter"),
    ("an unknown choice", "ties", top(ties="some"), "'?some'? is not one of thin, all, index, drop"),
    ("an unknown preset", "ties", top(preset="papers"), "'papers' is not a preset of 'ties' .did you mean 'paper'"),
    ("a preset where there is none", "linear", top(preset="paper"), "unknown parameter 'preset' of method 'linear'"),
    ("an unknown method", "tise", key(), "merge_method: unknown method 'tise' .did you mean 'ties'"),
    ("no base", "ties", lambda config: config.pop("base_model"), "base_model: 'ties' needs one: the model that the others were fine-tuned from"),
    ("a base without a weight of its own", "linear",
     lambda config: [config.update(base_model=config["models"].pop()["model"]), *(
         m.update(parameters={"weight": 0.5}) for m in config["models"])],
     "base_model: no weight for tensor .*: set a top-level weight under `parameters:`, or list the base"),
    ("a base of a copy", "passthrough", lambda config: config.update(base_model="/x", models=config["models"][:1]),
     "base_model: 'passthrough' takes no base"),
    ("two models to copy", "passthrough", lambda config: config["models"].append({"model": "/nowhere"}), "nowhere"),
    ("weights that cancel", "linear", top(weight=-1.0), "the weights sum to -3: `linear` divides by their sum"),
    ("a density per layer with one trim", "ties",
     top(trim_scope="model", density=[{"filter": "mlp", "value": 0.5}, {"value": 0.3}]),
     "density differs from other tensors', but `trim_scope: model` trims the model as a whole"),
    ("a negative seed", "ties", key(seed=-1), r"seed: must be an integer from 0 to 2\*\*64 - 1"),
    ("an unknown dtype", "ties", key(dtype="float8"), "dtype: .*float8.* is none of"),
    ("a key of the future", "ties", key(slices=[]), "slices"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "change", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_config_is_refused_with_the_place_and_the_cure(
    method: str, change: Change, message: str, make_models: Callable[..., list[Path]]
) -> None:
    config = config_for(method, make_models(shapes={"a.mlp": (4, 4), "b": (4,), "layers.0.x": (2,)}))
    change(config)
    with pytest.raises(InputError, match=message) as caught:
        plan(config, memory="1GiB")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_values_go_from_the_model_over_the_top_and_the_preset_to_the_default(
    make_models: Callable[..., list[Path]],
) -> None:
    paths = make_models(shapes={"w": (4, 4)})

    def bound(parameters: dict[str, Any], of_first: dict[str, Any]) -> dict[str, Any]:
        config = config_for("ties", paths, parameters=parameters)
        config["models"][0]["parameters"] = of_first
        (job,) = (job for job in plan(config, memory="1GiB").jobs if job.kind == "merge")
        return dict(job.parameters)

    assert bound({}, {})["density"] == (1.0, 1.0, 1.0)
    assert bound({"preset": "paper"}, {})["density"] == (0.2, 0.2, 0.2)
    assert bound({"preset": "paper", "density": 0.3}, {})["density"] == (0.3, 0.3, 0.3)
    assert bound({"preset": "paper", "density": 0.3}, {"density": 0.4})["density"] == (0.4, 0.3, 0.3)
    assert bound({"preset": "paper", "ties": "drop"}, {})["ties"] == "drop"
    assert bound({"preset": "paper"}, {})["count"] == "floor+1"
    assert bound({"rescale": True}, {})["rescale"] == "l1"
    assert bound({"rescale": False}, {})["rescale"] == "none"


def test_a_parameter_without_effect_is_noted_not_refused(make_models: Callable[..., list[Path]]) -> None:
    config = config_for("ties", make_models(shapes={"w": (4,)}), parameters={"int8_mask": True})
    assert any("int8_mask: ignored" in warning for warning in plan(config, memory="1GiB").warnings)


def test_too_little_memory_is_refused_with_both_numbers(make_models: Callable[..., list[Path]]) -> None:
    config = config_for("linear", make_models(shapes={"w": (4,)}))
    with pytest.raises(BudgetError, match=r"--memory 100 MiB is too little: .* give at least \d+ MiB"):
        plan(config, memory="100MiB")


# --- the plan as a whole


def plan_with(
    capacity: int, threads: int, paths: list[Path], use: Callable[[int, int], None], **top: Any
) -> MergePlan:
    use(capacity, threads)
    return plan(config_for(top.pop("method"), paths, **top))


def test_the_plan_says_how_many_passes_a_method_needs(
    make_models: Callable[..., list[Path]], small_capacity: Callable[[int, int], None]
) -> None:
    paths = make_models(shapes={"w": (300, 200), "v": (7,)})
    cases: list[tuple[str, dict[str, Any], int, str]] = [
        ("task_arithmetic", {}, 0, "split"),
        ("ties", {}, 0, "split"),  # density 1: nothing to trim
        ("ties", {"density": 0.5}, 0, "resident"),
        ("ties", {"density": 0.5, "trim_scope": "model"}, 1, "split"),
        ("ties", {"density": 0.5, "trim_scope": "model", "ties": "index"}, 2, "split"),
        ("ties", {"density": 0.5, "trim_scope": "model", "zero_sign": "majority"}, 2, "split"),
        ("dare_ties", {"density": 0.5}, 0, "split"),
        ("dare_ties", {"density": 0.5, "zero_sign": "majority"}, 1, "split"),
        ("dare_ties", {"density": 0.5, "mask": "exact"}, 0, "split"),  # the random stream is no input
        ("dare_ties", {"density": 0.5, "mask": "magnitude"}, 0, "resident"),
        ("dare_linear", {"density": 0.5, "rescale": "l1"}, 0, "resident"),
    ]
    for method, parameters, rounds, mode in cases:
        decided = plan_with(1 << 30, 1, paths, small_capacity, method=method, parameters=parameters)
        (job,) = (job for job in decided.jobs if job.name == "w")
        assert decided.model_rounds() == decided.model_passes() == rounds, (method, parameters)
        assert decided.work[job.ordinal].mode == mode, (method, parameters)
        small = plan_with(1 << 16, 1, paths, small_capacity, method=method, parameters=parameters)
        assert small.work[job.ordinal].mode == ("streamed" if mode == "resident" else "split")


def test_the_identity_depends_on_what_the_bytes_depend_on(
    make_models: Callable[..., list[Path]], small_capacity: Callable[[int, int], None]
) -> None:
    paths = make_models(shapes={"w": (30, 20)})
    one = plan_with(1 << 30, 1, paths, small_capacity, method="ties", parameters={"density": 0.5})
    same = plan_with(1 << 16, 7, paths, small_capacity, method="ties", parameters={"density": 0.5})
    assert one.identity() == same.identity()
    others = [
        plan_with(1 << 30, 1, paths, small_capacity, method="ties", parameters={"density": 0.4}),
        plan_with(1 << 30, 1, paths, small_capacity, method="ties", parameters={"density": 0.5}, seed=1),
        plan(config_for("ties", paths, parameters={"density": 0.5}), seed=1),
        plan(config_for("ties", paths, parameters={"density": 0.5}), shard_size=100),
    ]
    assert all(other.identity() != one.identity() for other in others)


def test_planning_the_same_twice_gives_the_same_plan(make_models: Callable[..., list[Path]]) -> None:
    config = config_for("ties", make_models(), parameters={"density": 0.5})
    one, two = plan(config, memory="1GiB", threads=2), plan(config, memory="1GiB", threads=2)
    assert list(one.steps()) == list(two.steps())
    assert one.layout == two.layout
    assert one.jobs == two.jobs


def test_config_errors_are_input_errors() -> None:
    assert issubclass(ConfigError, InputError)
    assert issubclass(BudgetError, InputError)


@pytest.mark.parametrize("extent", [Extent.ELEMENT, Extent.TENSOR], ids=["elements", "tensor"])
def test_a_formula_whose_temporaries_do_not_fit_is_refused_or_fits(extent: Extent) -> None:
    from streammerge.backends.torch.backend import torch_workspace

    budget = Budget(100 * MIB + SMALLEST_CAPACITY, 100 * MIB, 1)
    job = make_job(0, (400, 300), n_models=20, dtype="F32")
    try:
        work = plan_work(job, extent, budget, workspace=torch_workspace, holds=False)
    except BudgetError:
        return
    assert all(s.nbytes <= budget.capacity for s in steps([job], [work], budget, {}) if isinstance(s, Chunk))


def test_a_method_without_parameters_keeps_its_access_beside_copied_tensors(
    make_models: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from streammerge.api import plan as decide
    from streammerge.methods import registry

    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @registry.method("whole_tensor_here", access="tensor", base="none")
    def whole_tensor_here(models: Any, base: Any) -> Any:
        return models[0]

    paths = make_models()
    decided = decide(
        {"merge_method": "whole_tensor_here", "models": [str(p) for p in paths[1:]]}, memory="1GiB"
    )
    assert {str(a) for j, a in zip(decided.jobs, decided.access, strict=True) if j.kind == "merge"} == {
        "tensor"
    }


def test_a_gpus_block_fits_its_share_of_memory_and_is_a_multiple_of_4096() -> None:
    from streammerge.backends.torch.backend import device_block

    for share in (0, 1 << 28, 1 << 32, 13 << 30):
        block = device_block(share, 5)
        assert block % 4096 == 0
        assert 4096 <= block <= 1 << 24
        assert block == 4096 or block * 8 * 22 <= share
