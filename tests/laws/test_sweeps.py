"""A point of a sweep is byte for byte what `merge` gives with its values, and one read serves all points."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from streammerge.api import merge, plan, sweep
from streammerge.api.sweeping import Sweep
from streammerge.engine import streaming
from streammerge.errors import BudgetError, WorldError
from streammerge.events import Event
from streammerge.methods.catalog import load_builtin
from streammerge.methods.registry import all_methods
from streammerge.output.place import CONFIG_COPY
from streammerge.output.shards import ShardWriter
from streammerge.testing.models import output_bytes, write_models
from streammerge.testing.trial import PLENTY, capacity
from tests.conftest import config_for
from tests.laws.resume.traps import Trap, guarded

load_builtin()

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (300, 64),
    "model.layers.0.mlp.down_proj.weight": (96, 130),
    "model.layers.0.input_layernorm.weight": (64,),
    "scalar": (),
    "empty": (0, 5),
}

GRIDS: list[tuple[str, dict[str, Any], dict[str, list[Any]]]] = [
    ("linear", {"normalize": False}, {"weight": [0.3, 2]}),
    ("passthrough", {}, {"scale": [0.5, 1.0]}),
    ("task_arithmetic", {}, {"lambda": [0.3, 1.0], "weight": [0.5, 1]}),
    ("ties", {}, {"lambda": [0.5, 1.0], "density": [0.2, 0.7]}),
    ("ties", {"density": 0.3, "ties": "index"}, {"trim_scope": ["tensor", "model"], "weight": [1, 0.5]}),
    ("ties", {"density": 0.3, "zero_sign": "majority", "drop_rate": 0.2}, {"density": [0, 0.4, 1]}),
    ("dare_linear", {"rescale": "l1"}, {"density": [0.5, 0.9]}),
    ("dare_ties", {"mask": "exact"}, {"density": [0.5, 0.9], "lambda": [1, 0.5]}),
    ("fisher", {}, {"floor": [0.0, 1e-9]}),
    ("dare_fisher", {}, {"density": [0.5, 1]}),
    ("regmean", {}, {"alpha": [0.9, 1.0]}),
    ("breadcrumbs", {"ties": "index"}, {"gamma": [0.1, 0.2]}),
    ("breadcrumbs_ties", {}, {"density": [0.5, 0.7]}),
    ("della", {"density": 0.5, "zero_sign": "majority"}, {"epsilon": [0.1, 0.3]}),
    ("della_linear", {"density": 0.5, "epsilon": 0.1}, {"lambda": [0.5, 1]}),
    ("slerp", {}, {"t": [0.2, 0.8]}),
    ("nuslerp", {}, {"nuslerp_flatten": [True, False]}),
    ("multislerp", {}, {"weight": [0.5, 1]}),
    ("karcher", {}, {"max_iter": [3, 5]}),
    ("model_stock", {}, {"filter_wise": [True, False]}),
    ("nearswap", {}, {"t": [1e-4, 0.5]}),
    ("ram", {}, {"epsilon": [1e-5, 5e-4]}),
    ("ramplus_tl", {}, {"r": [0.1, 0.5]}),
    ("sce", {}, {"select_topk": [0.3, 1]}),
    ("arcee_fusion", {}, {"drop_rate": [0.2, 0.5]}),
]
GRIDS += [
    (name, {}, {"lambda" if "lambda" in method.parameters else "weight": [0.5, 1]})
    for name, method in all_methods().items()
    if method.origin == "built in" and name not in {listed for listed, _, _ in GRIDS}
]
"""Methods that are not listed are swept over a factor."""
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], list[Path]]:
    """Return what writes models once for each dtype."""
    written: dict[torch.dtype, list[Path]] = {}

    def get(dtype: torch.dtype) -> list[Path]:
        if dtype not in written:
            written[dtype] = write_models(tmp_path_factory.mktemp("models"), dtype=dtype, shapes=SHAPES)
        return written[dtype]

    return get


@pytest.fixture(autouse=True)
def without_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)


def swept(config: Mapping[str, Any] | str, out: Path, nbytes: int = PLENTY, **options: Any) -> Sweep:
    with capacity(nbytes, 2):
        return sweep(config, out, **{"on_event": lambda event: None, "device": "cpu", **options})


def in_little_memory(config: Mapping[str, Any] | str, out: Path) -> Sweep:
    """Sweep with the least buffers, a power of two, in which all points can be planned."""
    for bits in range(15, 24):
        try:
            return swept(config, out, 1 << bits)
        except BudgetError:
            assert not out.exists()
    raise AssertionError("no plan fits")


def check_points(result: Sweep, out: Path, singles: Path) -> None:
    """Assert that each point has the files of a merge of the config in it."""
    for name in result.points:
        merge(out / name / CONFIG_COPY, singles / name, on_event=lambda event: None, device="cpu")
        assert output_bytes(out / name) == output_bytes(singles / name), name


@pytest.mark.parametrize("number", range(len(GRIDS)), ids=[f"{i}-{one[0]}" for i, one in enumerate(GRIDS)])
def test_a_point_is_a_merge(number: int, models: Callable[..., list[Path]], tmp_path: Path) -> None:
    method, parameters, grid = GRIDS[number]
    config = config_for(method, models(DTYPES[number % 3]), parameters=parameters, seed=7, sweep=grid)
    check_points(in_little_memory(config, tmp_path / "out"), tmp_path / "out", tmp_path / "single")


@pytest.mark.parametrize("top", [{"quantize": "fp8"}, {"dtype": "float64"}, {"dtype": "float32"}], ids=str)
def test_a_point_is_a_merge_in_whatever_format(top: dict[str, str], tmp_path: Path) -> None:
    shapes = {"model.layers.0.mlp.down_proj.weight": (256, 128), "lm_head.weight": (40, 64)}
    paths = write_models(tmp_path, 2, shapes=shapes)
    config = config_for("ties", paths, sweep={"lambda": [0.5, 1], "density": [0.2, 0.5]}, **top)
    check_points(in_little_memory(config, tmp_path / "out"), tmp_path / "out", tmp_path / "single")


def test_the_output_of_stages_is_swept(models: Callable[..., list[Path]], tmp_path: Path) -> None:
    base, *rest = map(str, models(torch.bfloat16))
    stage = {"name": "a", "merge_method": "linear", "models": rest[:2], "dtype": "float32"}
    output = config_for("ties", models(torch.bfloat16), parameters={"density": 0.4})
    output |= {
        "base_model": base,
        "models": ["a", rest[2]],
        "sweep": {"lambda": [0.5, 1], "density": [0.3, 0.6]},
    }
    result = in_little_memory(yaml.safe_dump_all([stage, output]), tmp_path / "out")
    assert len(result.points) == 4
    check_points(result, tmp_path / "out", tmp_path / "single")


def test_one_read_serves_six_points(models: Callable[..., list[Path]], tmp_path: Path) -> None:
    grid = {"lambda": [0.3, 0.5, 1.0], "weight": [0.5, 1]}
    config = config_for("task_arithmetic", models(torch.bfloat16), sweep=grid)
    result = swept(config, tmp_path / "out")
    one = merge(
        tmp_path / "out" / "lambda=0.3,weight=1" / CONFIG_COPY, tmp_path / "one", on_event=lambda event: None
    )
    assert len(result.points) == 6
    assert result.bytes_read <= 1.1 * one.bytes_read
    assert result.bytes_written == 6 * one.bytes_written


def test_outputs_that_share_a_sum_are_computed_a_few_at_a_time(
    models: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three factors of two sums, two outputs at a time, in any order of the grid."""
    monkeypatch.setattr("streammerge.planning.joint.MOST_AT_ONCE", 2)
    grid = {"lambda": [0.3, 1, -2], "density": [0.2, 0.6]}
    config = config_for("ties", models(torch.float32), sweep=grid, dtype="bfloat16")
    check_points(swept(config, tmp_path / "out"), tmp_path / "out", tmp_path / "single")


@pytest.mark.parametrize("nbytes", [1 << 18, PLENTY], ids=["streamed", "held"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_points_that_share_thresholds_take_them_once(
    nbytes: int,
    scope: str,
    models: Callable[..., list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[str] = []
    real = streaming.reducer_of

    def counted(*arguments: Any) -> Any:
        taken.append(type(arguments[1]).__name__)
        return real(*arguments)

    for module in ("streaming", "answers"):
        monkeypatch.setattr(f"streammerge.engine.{module}.reducer_of", counted)
    counts = []
    for number, values in enumerate(([1], [0.3, 0.4, 0.5, 0.7, 1, 2])):
        taken.clear()
        config = config_for(
            "ties",
            models(torch.bfloat16),
            parameters={"density": 0.3, "trim_scope": scope},
            sweep={"lambda": values},
        )
        assert len(swept(config, tmp_path / f"{number}", nbytes).points) == len(values)
        counts.append(sorted(taken))
    assert counts[0] == counts[1] != []


def test_memory_for_few_points_makes_several_batches(
    models: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streammerge.engine import sweep as engine

    monkeypatch.setattr(engine, "_fit", lambda plans: len(plans) <= 2)
    config = config_for(
        "task_arithmetic", models(torch.bfloat16), sweep={"lambda": [0.1, 0.2, 0.3, 0.4, 0.5]}
    )
    reads = plan({k: v for k, v in config.items() if k != "sweep"}).bytes_to_read()
    progress: list[Mapping[str, Any]] = []
    result = swept(
        config, tmp_path / "out", on_event=lambda event: progress.append({"kind": event.kind, **event.values})
    )
    assert 3 * reads <= result.bytes_read <= 3.1 * reads
    shares = [one["elements"] for one in progress if one["kind"] == "progress"]
    assert shares == sorted(shares)
    assert all(one["elements_total"] == 5 * one_point(config) for one in progress if "elements_total" in one)
    check_points(result, tmp_path / "out", tmp_path / "single")


def one_point(config: Mapping[str, Any]) -> int:
    return sum(job.n_elements for job in plan({k: v for k, v in config.items() if k != "sweep"}).jobs)


@pytest.mark.parametrize("at", [1, 5, 12, 20])
def test_a_sweep_that_failed_goes_on_to_the_same_bytes(
    at: int, models: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for("ties", models(torch.bfloat16), sweep={"density": [0.3, 0.6], "lambda": [0.5, 1]})
    monkeypatch.setattr("streammerge.engine.scheduler._SYNC_SECONDS", 0.001)
    trap = Trap(WorldError("the disk is gone"), at, once=False)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", guarded(ShardWriter.write, trap))
        with pytest.raises(WorldError):
            swept(config, tmp_path / "out", 1 << 19)
    events: list[Event] = []
    result = swept(config, tmp_path / "out", 1 << 18, on_event=events.append)  # cut differently
    assert trap.sprung
    check_points(result, tmp_path / "out", tmp_path / "single")
    again = swept(config, tmp_path / "out")
    assert again.bytes_written == 0


def test_points_that_were_begun_apart_are_finished_together(
    models: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One point has more than the other: each piece is merged for those that lack it, and nothing is written twice."""
    config = config_for("task_arithmetic", models(torch.bfloat16), sweep={"lambda": [0.3, 0.5]})
    out = tmp_path / "out"
    monkeypatch.setattr("streammerge.engine.scheduler._SYNC_SECONDS", 0.001)
    begun = 0
    for name, at in (("lambda=0.3", 9), ("lambda=0.5", 4)):
        half = {**config, "sweep": None, "parameters": {"lambda": float(name[-3:])}}
        half.pop("sweep")
        with monkeypatch.context() as patch:
            patch.setattr(
                ShardWriter, "write", guarded(ShardWriter.write, Trap(WorldError("full"), at, once=False))
            )
            with capacity(1 << 17, 1), pytest.raises(WorldError):
                merge(half, tmp_path / "begun" / name, on_event=lambda event: None, device="cpu")
        begun += 1
    swept({**config, "sweep": {"lambda": [0.3, 0.5]}}, tmp_path / "whole")
    assert begun == 2
    for name in ("lambda=0.3", "lambda=0.5"):
        out.mkdir(exist_ok=True)
        (tmp_path / "begun" / name).rename(out / name)
    (out / "sweep.json").write_bytes((tmp_path / "whole" / "sweep.json").read_bytes())
    result = swept(config, out)
    nbytes = sum(path.stat().st_size for path in out.glob("*/model.safetensors"))
    assert 0 < result.bytes_written < nbytes
    check_points(result, out, tmp_path / "single")
