"""A whole merge by the fused kernels, through the rings and the launcher, in a process where Triton interprets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_a_merge_by_the_kernels_through_the_rings_has_the_bytes_of_the_cpus() -> None:
    """All eight methods of the program: run it without arguments, for 40 CPU seconds."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.backends.merges_by_kernels", "ties"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stdout == "ties equal\n", done.stderr[-3000:]
