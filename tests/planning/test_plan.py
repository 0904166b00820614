"""The planner is pure: headers and numbers in, jobs, chunks and byte offsets out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from streammerge.algebra.extent import Extent
from streammerge.api import merge, plan
from streammerge.errors import BudgetError, ConfigError, InputError
from streammerge.planning.memory.budget import MIB, SMALLEST_CAPACITY, Budget
from streammerge.planning.plan import MergePlan
from streammerge.planning.schedule import (
    Chunk,
    plan_work,
    steps,
)
from tests.conftest import config_for, read_tensors
from tests.planning.jobs import make_job

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

    monkeypatch.setattr(registry, "_METHODS", dict(registry.all_methods()))

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
