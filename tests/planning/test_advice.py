"""The advice of `plan`: the least memory, the memory that streams nothing, the disk, the time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streammerge.api import plan
from streammerge.errors import BudgetError
from streammerge.io import disk
from streammerge.io.disk import space_for
from streammerge.output.place import STATE
from streammerge.planning.description import describe
from streammerge.planning.plan import MergePlan
from streammerge.report.plan import ASSUMED_RATE, advice
from tests.cli.running import Cli, assert_refused, cli, write_config
from tests.conftest import config_for

__all__ = ["cli"]

MIB = 1 << 20
LARGE = {"embed.weight": (4000, 4096), "layers.0.weight": (64, 64)}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a merge with statistics of tensors of 33 MB."""
    from tests.conftest import write_models

    paths = write_models(tmp_path_factory.mktemp("advice"), 2, shapes=LARGE)
    return config_for("ties", paths, parameters={"density": 0.5})


def streamed(config: dict[str, Any], memory: int) -> object:
    return describe(plan(config, memory=memory, threads=2))["streamed_tensors"]


def division_of(decided: MergePlan) -> Any:
    assert decided.division is not None
    return decided.division


def test_the_least_memory_is_enough_and_a_mebibyte_less_is_refused(config: dict[str, Any]) -> None:
    least = division_of(plan(config, memory="8GiB", threads=2)).least()
    assert plan(config, memory=least, threads=2).budget.total == least
    with pytest.raises(BudgetError, match=f"give at least {least // MIB} MiB"):
        plan(config, memory=least - MIB, threads=2)


def test_from_the_memory_that_is_named_no_tensor_is_streamed(config: dict[str, Any]) -> None:
    division = division_of(plan(config, memory="8GiB", threads=2))
    once = division.least_unstreamed()
    assert once > division.least()
    assert streamed(config, once) == 0
    assert streamed(config, int(once * 0.98)) == 1


def test_the_advice_does_not_depend_on_the_memory_that_is_given(config: dict[str, Any]) -> None:
    small, large = (advice(plan(config, memory=m, threads=2), None) for m in ("300MiB", "8GiB"))
    keys = ("memory_least", "memory_read_once")
    assert {key: small[key] for key in keys} == {key: large[key] for key in keys}


def test_the_text_says_what_is_read_twice_and_with_which_memory_it_is_not(
    cli: Cli, config: dict[str, Any], tmp_path: Path
) -> None:
    path = write_config(tmp_path / "c.yml", config)
    few = cli("plan", path, "--memory", "260MiB").out
    assert "1 tensor larger than half the buffers is read more than once; with --memory " in few
    many = cli("plan", path, "--memory", "8GiB").out
    assert "more than once" not in many
    assert "reads each tensor once from " in many
    assert "0 tensors" not in many
    assert "1 chunks" not in many


def test_the_time_is_the_bytes_by_a_rate_that_is_stated(
    cli: Cli, config: dict[str, Any], tmp_path: Path
) -> None:
    run = cli("plan", write_config(tmp_path / "c.yml", config), "--json")
    values = json.loads(run.out)
    assert values["bytes_per_second_assumed"] == ASSUMED_RATE
    nbytes = values["bytes_to_read"] + values["bytes_to_write"]
    assert values["seconds_estimate"] == pytest.approx(nbytes / ASSUMED_RATE, abs=0.06)


# --- the disk


def full_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(
        disk.os, "statvfs", lambda place: SimpleNamespace(f_bavail=free, f_frsize=1, f_flag=0)
    )


def test_a_disk_without_room_is_warned_of_with_both_numbers(
    cli: Cli, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, 5 * MIB)
    path = write_config(tmp_path / "c.yml", config)
    run = cli("plan", path, tmp_path / "out")
    assert run.code == 0
    assert "needs 31.3 MiB, but only 5.0 MiB are free, so the merge will be refused" in run.out
    values = json.loads(cli("plan", path, tmp_path / "out", "--json").out)
    assert values["disk"] == {
        "path": str(tmp_path),
        "bytes_needed": values["bytes_to_write"],
        "bytes_free": 5 * MIB,
    }
    assert len(values["advice"]) == 1


def test_a_disk_with_room_is_no_warning(cli: Cli, config: dict[str, Any], tmp_path: Path) -> None:
    run = cli("plan", write_config(tmp_path / "c.yml", config), tmp_path / "a" / "b")
    assert "warning" not in run.out
    assert f"{tmp_path / 'a' / 'b'} needs 31.3 MiB" in run.out


def test_what_an_earlier_run_has_allocated_is_not_needed_again(
    config: dict[str, Any], tmp_path: Path
) -> None:
    layout = plan(config).layout
    whole = space_for(tmp_path / "out", layout.sizes).needed
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{layout.shards[0].name}.partial").write_bytes(b"x" * MIB)
    assert space_for(tmp_path / "out", layout.sizes).needed == whole - MIB


# --- what a merge would refuse


def test_plan_refuses_an_output_as_merge_does(cli: Cli, config: dict[str, Any], tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yml", config)
    (tmp_path / "file").write_text("mine")
    assert_refused(cli("plan", path, tmp_path / "file"), "not a directory")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    assert_refused(cli("plan", path, tmp_path / "full"), "did not write")
    assert_refused(cli("plan", path, config["base_model"]), "holds the input")
    assert not (tmp_path / "out").exists()


def test_plan_refuses_two_models_of_one_content_that_would_draw_one_mask(
    cli: Cli, make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    base, model, _ = make_models(n_models=2, shapes={"w": (40, 40)})
    paths = [base, model, Path(shutil.copytree(model, tmp_path / "twin"))]
    refused = write_config(tmp_path / "c.yml", config_for("dare_ties", paths, parameters={"density": 0.5}))
    assert_refused(cli("plan", refused), "alias")
    assert_refused(cli("merge", refused, tmp_path / "out"), "alias")
    assert cli("plan", write_config(tmp_path / "d.yml", config_for("task_arithmetic", paths))).code == 0


def test_plan_says_what_an_earlier_merge_has_left(
    cli: Cli, make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    path = write_config(tmp_path / "c.yml", config_for("linear", make_models(2, shapes={"w": (8, 8)})))
    out = tmp_path / "out"
    assert json.loads(cli("plan", path, out, "--json").out)["out_holds"] is None
    cli("merge", path, out)
    assert "holds a finished merge" in cli("plan", path, out).out
    (out / STATE).mkdir()
    assert json.loads(cli("plan", path, out, "--json").out)["out_holds"] == "unfinished"
