"""The memory of a merge is known before it starts: lists, statistics, buffers; and a refusal asks for enough."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.api import merge, plan
from streammerge.backends.cpu.backend import CPU
from streammerge.errors import BudgetError
from streammerge.events import Event
from streammerge.machine import left_in_groups, peak_memory
from streammerge.planning.memory.allocate import StatisticsMemory, statistics_memory
from streammerge.planning.memory.budget import MIB, SMALLEST_CAPACITY, Budget
from streammerge.planning.plan import MergePlan
from streammerge.statistics.base import FEWEST_BINS, MOST_BINS
from streammerge.units import format_at_least, parse_size

Shapes = dict[str, tuple[int, ...]]
TINY: Shapes = {sys.intern(f"model.layers.{i}.mlp.experts.gate.weight"): (16,) for i in range(3000)}
"""Names that Python's own table has already: it grows by doubling, at any moment."""


def write_headers(directory: Path, shapes: Shapes, n_models: int) -> list[Path]:
    """Write models whose data are a hole in the file: a base, and so many more."""
    entries: dict[str, Any] = {}
    position = 0
    for name, shape in shapes.items():
        end = position + 2 * prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries).encode()
    paths = [directory / f"m{i}" for i in range(n_models + 1)]
    for path in paths:
        path.mkdir()
        with (path / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + position)
    return paths


def config_of(method: str, paths: Sequence[Path], parameters: dict[str, Any]) -> dict[str, Any]:
    models = [{"model": str(path), "alias": path.name} for path in paths[1:]]
    base = {} if method == "linear" else {"base_model": str(paths[0])}
    return {"merge_method": method, "models": models, "parameters": parameters, **base}


# --- what a refusal asks for


@pytest.mark.parametrize(
    ("method", "parameters", "shapes", "n_models", "least"),
    [
        # The lists of tensors do not fit.
        ("linear", {}, TINY, 3, 254),
        ("ties", {"density": 0.3}, TINY, 3, 254),
        # One row must be held, or all columns.
        ("della", {"density": 0.5}, {"w": (3, 4_000_000)}, 3, 400),
        ("nuslerp", {"nuslerp_flatten": False}, {"w": (3, 4_000_000)}, 2, 400),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, {"w": (3, 1_000_000)}, 2, 500),
        # The tensor that is refused is not the first that does not fit.
        ("della", {"density": 0.5}, {"a": (3, 2_000_000), "b": (3, 4_000_000), "c": (3, 1_000_000)}, 3, 400),
        # Statistics grow with the memory: what they take of it has to be found.
        ("karcher", {}, {"w": (30_000_000,)}, 90, 250),
    ],
)
def test_the_memory_that_a_refusal_asks_for_is_enough(
    method: str, parameters: dict[str, Any], shapes: Shapes, n_models: int, least: int, tmp_path: Path
) -> None:
    config = config_of(method, write_headers(tmp_path, shapes, n_models), parameters)
    with pytest.raises(BudgetError) as refused:
        plan(config, memory=CPU.reserve + SMALLEST_CAPACITY, threads=2)
    asked = re.search(r"give at least (\d+ MiB)", str(refused.value))
    assert asked is not None
    assert parse_size(asked[1]) >= least * MIB
    decided = plan(config, memory=asked[1], threads=2)
    assert decided.budget.capacity >= SMALLEST_CAPACITY
    if "nuslerp_row_wise" not in parameters:  # streamed, columns take more than held
        with pytest.raises(BudgetError):
            plan(config, memory=parse_size(asked[1]) - 3 * MIB, threads=2)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("ties", {"density": 0.3}),
        ("ties", {"density": 0.3, "trim_scope": "model", "ties": "index"}),
        ("ties", {"density": 0.3, "zero_sign": "majority", "ties": "drop"}),
        ("karcher", {}),
    ],
)
def test_hardly_any_memory_is_refused_once_with_all_parts_of_what_suffices(
    method: str, parameters: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of(method, write_headers(tmp_path, {"w": (1000,)}, 3), parameters)
    with pytest.raises(BudgetError) as refused:
        plan(config, memory=MIB, threads=2)
    said = str(refused.value)
    parts = re.search(
        r"needs (.+), lists of 1 tensor and .+ inputs (.+), statistics (.+), buffers (.+); .* least (\d+ MiB)$",
        said,
    )
    assert parts is not None, said
    assert (parts[3] == "0 B") == (method == "linear")
    *some, asked = (parse_size(part) for part in parts.groups() if part != "0 B")
    assert abs(sum(some) - asked) < MIB
    plan(config, memory=asked, threads=2)
    with pytest.raises(BudgetError):
        plan(config, memory=asked - 3 * MIB, threads=2)


def test_a_refusal_names_the_tensor_that_takes_the_most(tmp_path: Path) -> None:
    shapes: Shapes = {"a": (3, 2_000_000), "b": (3, 4_000_000), "c": (3, 1_000_000)}
    config = config_of("della", write_headers(tmp_path, shapes, 3), {"density": 0.5})
    with pytest.raises(BudgetError, match=r"^b: this method holds one row of it"):
        plan(config, memory="256MiB")


@given(st.integers(1, 1 << 45))
def test_a_size_that_is_asked_for_is_never_rounded_down(nbytes: int) -> None:
    assert nbytes <= parse_size(format_at_least(nbytes)) < nbytes + MIB


# --- lists of tensors


def lists_of(decided: MergePlan) -> int:
    return decided.budget.reserve - CPU.reserve - decided.statistics_memory.nbytes


def traced_peak(directory: Path, shapes: Shapes) -> tuple[int, int]:
    """Merge, and return the peak of Python's objects, and what the plan says of lists."""
    directory.mkdir()
    config = config_of("linear", write_headers(directory, shapes, 3), {})
    tracemalloc.start()
    try:
        merge(config, directory / "out", memory="512MiB", device="cpu")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return peak, lists_of(plan(config, memory="512MiB", device="cpu"))


def test_what_lists_of_many_tensors_take_is_no_more_than_the_plan_says(tmp_path: Path) -> None:
    """Thousands of tensors and hardly a byte in them. What one tensor takes is not for lists."""
    few, _ = traced_peak(tmp_path / "few", {"w": (16,)})
    few, few_counted = traced_peak(tmp_path / "few again", {"w": (16,)})  # everything is imported by now
    many, counted = traced_peak(tmp_path / "many", dict(list(TINY.items())[:1500]))
    assert (counted - few_counted) / 4 < many - few < counted - few_counted


def test_answers_that_wait_for_the_whole_model_are_counted(tmp_path: Path) -> None:
    paths = write_headers(tmp_path, TINY, 3)
    whole = {"density": 0.3, "trim_scope": "model"}
    plain = lists_of(plan(config_of("ties", paths, whole), memory="1GiB"))
    dropped = config_of("dare_ties", paths, {"density": 0.5, "mask": "exact"})
    assert lists_of(plan(dropped, memory="1GiB")) == plain  # its answers wait for nothing
    dropped = config_of("ties", paths, {**whole, "drop_rate": 0.5, "drop_mask": "exact"})
    assert lists_of(plan(dropped, memory="1GiB")) >= plain + 3 * len(TINY) * 200


# --- statistics


@given(st.integers(0, 5000), st.integers(0, 10_000), st.integers(1, 40), st.integers(24, 1 << 16))
def test_statistics_take_a_share_of_the_memory_unless_they_need_more(
    ranks: int, partials: int, threads: int, capacity: int
) -> None:
    budget = Budget(capacity * MIB, 0, threads)
    room = statistics_memory(ranks, partials, 1 << 30, budget)
    assert room.bins == MOST_BINS or FEWEST_BINS <= room.bins < MOST_BINS
    windows = 4 * room.bins * (ranks + budget.workers) if ranks else 0
    sums = 3 * budget.workers * 8 * partials * (room.elements // 4096) if partials else 0
    assert room.nbytes == windows + sums
    least = 4 * FEWEST_BINS * (ranks + budget.workers) + 3 * budget.workers * 8 * partials
    assert room.nbytes <= capacity * MIB // 4 + least


@given(st.integers(1, 300), st.integers(24, 4000))
def test_more_memory_never_leaves_less_for_buffers(ranks: int, capacity: int) -> None:
    def left(nbytes: int) -> int:
        return nbytes - statistics_memory(ranks, 1, 1 << 30, Budget(nbytes, 0, 2)).nbytes

    assert left(capacity * MIB) <= left((capacity + 1) * MIB)


def test_a_merge_without_statistics_gives_them_no_room(make_models: Callable[..., list[Path]]) -> None:
    paths = make_models()
    assert plan(config_of("linear", paths, {}), memory="512MiB").statistics_memory == StatisticsMemory()
    assert plan(config_of("ties", paths, {"density": 0.3}), memory="512MiB").statistics_memory.nbytes > 0


# --- memory that is not there


def test_a_warning_says_so_where_less_memory_is_free_than_asked_for(
    make_models: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("linear", make_models(), {})
    assert not plan(config, memory="1GiB").warnings
    monkeypatch.setattr("streammerge.api.deciding.available_memory", lambda: 300 * MIB)
    monkeypatch.setattr("streammerge.api.deciding.own_memory", lambda: 100 * MIB)
    said = [w for w in plan(config, memory="1GiB").warnings if w.startswith("--memory 1.0 GiB exceeds the")]
    assert len(said) == 1
    assert "the 400 MiB available" in said[0]
    assert not plan(config, memory="400MiB").warnings
    events: list[Event] = []
    merge(config, tmp_path / "out", memory="1GiB", on_event=events.append)
    assert said[0] in [e.values["message"] for e in events if e.kind == "warning"]
    kinds = [event.kind for event in events]
    assert kinds.index("warning") < kinds.index("start")


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_any_control_group_around_the_process_counts(version: int, tmp_path: Path) -> None:
    mount, membership = tmp_path / "mount", tmp_path / "cgroup"
    limit, used, cache = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    root = mount / "memory" if version == 1 else mount
    membership.write_text("3:cpu:/x\n9:memory:/jobs/one\n" if version == 1 else "0::/jobs/one\n")
    inner = root / "jobs" / "one"
    inner.mkdir(parents=True)
    (inner / limit).write_text("9223372036854771712" if version == 1 else "max")
    for group, numbers in ((root / "jobs", (1000, 700, 50)), (root, (5000, 700, 0))):
        for name, number in zip((limit, used), numbers, strict=False):
            (group / name).write_text(f"{number}\n")
        (group / "memory.stat").write_text(f"anon 4\n{cache} {numbers[2]}\n")
    assert list(left_in_groups(membership, mount)) == [350, 4300]


def test_a_machine_without_control_groups_limits_nothing(tmp_path: Path) -> None:
    assert list(left_in_groups(tmp_path / "none", tmp_path)) == []
    (tmp_path / "cgroup").write_text("0::/\n")
    assert list(left_in_groups(tmp_path / "cgroup", tmp_path / "none")) == []


def test_the_peak_is_the_process_s_own_and_not_that_of_the_one_that_started_it() -> None:
    code = "from streammerge.machine import peak_memory; print(peak_memory())"
    held = bytearray(400 << 20)
    held[:: 1 << 12] = bytes(len(held) >> 12)
    assert held.count(1) == 0
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(done.stdout) < 200 << 20
    assert peak_memory() > 400 << 20
