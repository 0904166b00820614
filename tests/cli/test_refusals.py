"""Refusals: one line and exit code 2 before anything is written, and an output directory that stays as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.running import FEW, Cli, assert_refused, tree_of, write_config
from tests.conftest import config_for, write_model

# --- refusals: the config and the models


def _nothing(paths: list[Path], config: dict[str, Any]) -> Any:
    return config


def _unknown_method(paths: list[Path], config: dict[str, Any]) -> Any:
    return {**config, "merge_method": "tyes"}


def _missing_model(paths: list[Path], config: dict[str, Any]) -> Any:
    return {**config, "models": [*config["models"], {"model": str(paths[0].parent / "nowhere")}]}


def _missing_base(paths: list[Path], config: dict[str, Any]) -> Any:
    return {**config, "base_model": str(paths[0].parent / "nowhere")}


def _no_base(paths: list[Path], config: dict[str, Any]) -> Any:
    return {key: value for key, value in config.items() if key != "base_model"}


def _unknown_key(paths: list[Path], config: dict[str, Any]) -> Any:
    return {**config, "modles": []}


def _unknown_parameter(paths: list[Path], config: dict[str, Any]) -> Any:
    return {**config, "parameters": {"densty": 0.5}}


def _bad_density(paths: list[Path], config: dict[str, Any]) -> Any:
    return {**config, "parameters": {"density": 1.5}}


def _missing_tensor(paths: list[Path], config: dict[str, Any]) -> Any:
    tensors = {"embed.weight": torch.zeros(50, 16), "norm": torch.zeros(16)}
    write_model(paths[2], {**tensors, "position_ids": torch.arange(16)})
    return config


def _wrong_shape(paths: list[Path], config: dict[str, Any]) -> Any:
    tensors = {"embed.weight": torch.zeros(51, 16), "layers.0.weight": torch.zeros(16, 16)}
    write_model(paths[2], {**tensors, "norm": torch.zeros(16), "position_ids": torch.arange(16)})
    return config


def _empty_model(paths: list[Path], config: dict[str, Any]) -> Any:
    (paths[1] / "model.safetensors").unlink()
    return config


def _short_model(paths: list[Path], config: dict[str, Any]) -> Any:
    file = paths[1] / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    return config


def _escape_in_a_missing_tensor(paths: list[Path], config: dict[str, Any]) -> Any:
    tensors = {name: torch.zeros(shape) for name, shape in FEW.items()}
    write_model(paths[0], {**tensors, "a\x1b[31m\nb": torch.zeros(3)})
    return config


def _yaml(text: str) -> Callable[[list[Path], dict[str, Any]], str]:
    return lambda paths, config: text


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_yaml("merge_method: [ties\n"), ["config.yml"]),
        (_yaml(""), ["config.yml"]),
        (_yaml("- a\n- b\n"), ["config.yml"]),
        (_yaml("merge_method: !!python/object/apply:os.system ['true']\n"), ["config.yml"]),
        (_yaml("merge_method: linear\n"), ["models"]),
        (_yaml("models: [a]\n"), ["merge_method"]),
        (_unknown_method, ["tyes", "did you mean 'ties'?"]),
        (_missing_model, ["nowhere"]),
        (_missing_base, ["nowhere"]),
        (_no_base, ["base_model"]),
        (_unknown_key, ["modles", "models"]),
        (_unknown_parameter, ["densty", "density"]),
        (_bad_density, ["density", "1.5"]),
        (_missing_tensor, ["layers.0.weight", "m2", "missing"]),
        (_wrong_shape, ["embed.weight", "[51, 16]", "[50, 16]"]),
        (_empty_model, ["m1"]),
        (_short_model, ["m1"]),
        (_escape_in_a_missing_tensor, ["a\\x1b[31m\\nb"]),
    ],
)
@pytest.mark.parametrize("command", ["merge", "plan"])
def test_a_bad_config_or_model_is_one_line_and_exit_2_before_anything_is_written(
    command: str, spoil: Any, words: list[str], cli: Cli, paths: list[Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path / "config.yml", spoil(paths, config_for("ties", paths)))
    run = cli(command, config, *([tmp_path / "out"] if command == "merge" else []))
    assert_refused(run, *words)
    assert run.out == ""
    assert not (tmp_path / "out").exists()


def test_a_missing_config_is_one_line(cli: Cli, tmp_path: Path) -> None:
    assert_refused(cli("merge", tmp_path / "none.yml", tmp_path / "out"), "none.yml", "No such file")


def test_a_directory_as_config_is_one_line(cli: Cli, tmp_path: Path) -> None:
    assert_refused(cli("plan", tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    ("memory", "word"),
    [("0", "0"), ("-1", "-1"), ("much", "much"), ("nan", "nan"), ("", "''"), ("1KiB", "at least")],
)
@pytest.mark.parametrize("command", ["merge", "plan"])
def test_an_impossible_memory_is_refused(
    command: str, memory: str, word: str, cli: Cli, config: Path, tmp_path: Path
) -> None:
    run = cli(command, config, *([tmp_path / "out"] if command == "merge" else []), f"--memory={memory}")
    assert_refused(run, word)
    assert not (tmp_path / "out").exists()


def test_a_huge_memory_is_accepted_and_not_allocated(cli: Cli, config: Path, tmp_path: Path) -> None:
    assert cli("merge", config, tmp_path / "out", "--memory=1024TiB").code == 0


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:99", "", "\x1b[31m", "cpu:1"])
def test_an_unknown_device_is_refused(device: str, cli: Cli, config: Path, tmp_path: Path) -> None:
    assert_refused(cli("merge", config, tmp_path / "out", "--device", device), "device")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["0", "-5", "big"])
def test_an_impossible_shard_size_is_refused(size: str, cli: Cli, config: Path, tmp_path: Path) -> None:
    assert_refused(cli("merge", config, tmp_path / "out", f"--shard-size={size}"))
    assert not (tmp_path / "out").exists()


# --- refusals: the output directory


def test_an_output_that_is_a_file_is_refused(cli: Cli, config: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert_refused(cli("merge", config, tmp_path / "out", "--overwrite"), "out", "not a directory")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_output_below_a_file_is_one_line(cli: Cli, config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    run = cli("merge", config, tmp_path / "file" / "out")
    assert run.code in (1, 2)
    assert len(run.complaints) == 1


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("which", [0, 1])
def test_an_output_that_is_an_input_is_refused_and_untouched(
    overwrite: list[str], which: int, cli: Cli, config: Path, paths: list[Path], tmp_path: Path
) -> None:
    before = tree_of(paths[which])
    (tmp_path / "link").symlink_to(paths[which], target_is_directory=True)
    for out in (paths[which], tmp_path / "link"):
        assert_refused(cli("merge", config, out, *overwrite), "holds the input")
    assert tree_of(paths[which]) == before


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_an_output_that_holds_a_foreign_model_is_refused_and_untouched(
    overwrite: list[str], cli: Cli, config: Path, tmp_path: Path
) -> None:
    write_model(tmp_path / "out", {"w": torch.zeros(3)})
    before = tree_of(tmp_path / "out")
    assert_refused(cli("merge", config, tmp_path / "out", *overwrite), "did not write")
    assert tree_of(tmp_path / "out") == before


def test_an_empty_output_directory_is_used(cli: Cli, config: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert cli("merge", config, tmp_path / "out").code == 0


def test_a_finished_merge_is_not_replaced_by_another_without_overwrite(
    cli: Cli, config: Path, paths: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli("merge", config, out).code == 0
    before = tree_of(out)
    assert_refused(cli("merge", config, out, "--seed", "5"), "seed", "--overwrite")
    assert tree_of(out) == before
    assert cli("merge", config, out, "--seed", "5", "--overwrite").code == 0
    assert json.loads((out / "streammerge.json").read_text())["seed"] == 5


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_an_output_below_a_file_is_refused_by_plan_and_merge_alike(
    cli: Cli, config: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(
        cli(command, config, tmp_path / "file" / "out"), "file is not a directory: choose a different OUT"
    )
