"""A whole merge by the fused kernels, through the rings and the launcher, in a process where Triton interprets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import PATIENCE

pytest.importorskip("triton")


CASES = ["ties", "quantised", "quantised, streamed", "quantised experts", "plain FP8", "stacked FP8"]


@pytest.fixture(scope="module")
def said() -> list[str]:
    """Run a merge of each case; all of the program's, without arguments, take 50 CPU seconds."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.backends.merges_by_kernels", *CASES],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_merges_by_the_kernels_through_the_rings_have_the_bytes_of_the_cpus(said: list[str]) -> None:
    assert [line.partition(" equal")[0] for line in said if " equal" in line] == CASES


def test_codes_and_scales_travel_in_place_of_values(said: list[str]) -> None:
    shares = {line.partition(" equal: ")[0]: float(line.split()[-4]) for line in said if ":" in line}
    assert shares.keys() == set(CASES[1:])
    assert max(shares.values()) < 0.6
    assert shares["quantised experts"] < 0.1
