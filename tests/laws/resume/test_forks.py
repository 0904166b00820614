"""Merges of the command line in forks of one warm process: killed, stopped by signals, and started several at once."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.laws.resume.slow_merge import ROOT
from tests.patience import PATIENCE

NUMBERS = {"kills": 16, "signals": 8, "starts": 5}


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return what each action of `tests.laws.resume.forks` counted."""
    options = [word for name, number in NUMBERS.items() for word in (f"--{name}", str(number))]
    command = [
        sys.executable,
        "-m",
        "tests.laws.resume.forks",
        str(tmp_path_factory.mktemp("forks")),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_bytes(figures: dict[str, dict[str, Any]]) -> None:
    """Four methods, one shard and several, one to three kills in a row; tools/prove/random_kills.py does more."""
    assert figures["kills"]["kills"] >= NUMBERS["kills"]
    assert figures["kills"]["killed three times in a row"] >= 4


@pytest.mark.slow
def test_signals_at_random_moments_stop_it_in_one_line_within_seconds(
    figures: dict[str, dict[str, Any]],
) -> None:
    assert figures["signals"]["stopped"]
    assert figures["signals"]["longest seconds"] < 10


@pytest.mark.slow
def test_of_merges_that_start_at_once_one_wins_and_the_others_are_refused(
    figures: dict[str, dict[str, Any]],
) -> None:
    counted = {name: figures["starts"][name] for name in ("rounds", "winners", "refused")}
    assert counted == {"rounds": 5, "winners": 5, "refused": 10}
