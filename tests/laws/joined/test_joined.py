"""A merge that several processes share gives the bytes of one process, whatever happens to some of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from streammerge.api import merge
from streammerge.cli.entry import cli
from streammerge.errors import InputError
from tests.conftest import config_for, write_model

SCENES = (
    "every_method",
    "every_kind",
    "claims_that_exclude_nobody",
    "kills",
    "kills_in_the_passes",
    "zombies",
    "failures",
    "changed_inputs",
    "full_disk",
    "alone_and_together",
    "other_merges",
    "verification",
    "stopped",
)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return how each scene ended: empty if all was well."""
    command = [sys.executable, "-m", "tests.laws.joined.forks", str(tmp_path_factory.mktemp("joined"))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("scene", SCENES)
def test_several_processes_give_the_bytes_of_one(scene: str, ended: dict[str, str]) -> None:
    assert ended.pop(scene) == ""


def test_no_scene_is_left_out(ended: dict[str, str]) -> None:
    assert ended == {}


@pytest.mark.parametrize(
    ("options", "name", "more", "words"),
    [
        ({"overwrite": True}, "out", {}, "would discard what the others have done"),
        ({}, "out.safetensors", {}, "one file is one shard"),
        ({}, "out", {"output": "lora", "rank": 1}, "an adapter is one file: leave the option out"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_written(
    options: dict[str, Any], name: str, more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    paths = [
        write_model(tmp_path / place, {"layers.0.q.weight": torch.ones(8, 8)}) for place in ("base", "a")
    ]
    with pytest.raises(InputError, match=words):
        merge(
            {**config_for("task_arithmetic", paths), **more},
            tmp_path / name,
            join=True,
            progress=False,
            **options,
        )
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["sweep", "c.yml", "out", "--join"], "--join: a sweep makes all points from one read"),
        (
            ["moe", "c.yml", "out", "--on", "processes:2"],
            "--on: `streammerge merge CONFIG OUT` makes the same",
        ),
        (["average", "runs", "out", "--join"], "--join: `streammerge merge` takes it, with a config"),
    ],
)
def test_commands_that_share_nothing_say_what_does(command: list[str], words: str) -> None:
    found = CliRunner().invoke(cli, command)
    assert found.exit_code == 2
    assert words in found.output
