"""A merge into an object store that several processes share, against a real S3 server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE
from tests.s3_server import Server

SCENES = (
    "every_kind",
    "claims_that_exclude_nobody",
    "one_shard",
    "kills",
    "zombies",
    "a_different_merge",
    "looking_on",
)


@pytest.fixture(scope="module")
def ended(s3_server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return how each scene ended: empty if all was well."""
    command = [sys.executable, "-m", "tests.laws.joined.store_forks", str(tmp_path_factory.mktemp("joined"))]
    where = Path(__file__).parents[3]
    environment = {**os.environ, **s3_server.environment()}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=where, env=environment, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("scene", SCENES)
def test_several_processes_give_the_bytes_of_one(scene: str, ended: dict[str, str]) -> None:
    assert ended.pop(scene) == ""


def test_no_scene_is_left_out(ended: dict[str, str], s3_server: Server) -> None:
    assert ended == {}
    assert s3_server.parts("bench", "") == []  # also those of the processes that were killed are gone
