"""The fused kernels have the CPU's bits, by Triton's interpreter in a process of its own; and the comparison has teeth.

The long versions are programs: `tools/prove/gpu_bits.py`, `tools/prove/gpu_merges.py` and `tools/prove/gpu_teeth.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE

pytest.importorskip("triton")

PROGRAMS = Path(__file__).parents[3] / "tools" / "prove"
PLANTED = [
    "fused multiply-add",
    "two roundings",
    "no gradual underflow",
    "a zero without its sign",
    "a model that competes with itself",
]
CODE = f"""
import sys, json, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {str(PROGRAMS)!r})
import gpu_bits, gpu_merges, gpu_teeth, torch
compare = gpu_bits.Comparison(gpu_merges.register())
compare.few()
compare.sizes()
compare.codes()
compare.on_the_way()
found = {{"done": compare.done, "different": compare.different}}
found["merges"] = gpu_merges.compare(gpu_merges.FEW, dtypes=(torch.bfloat16, torch.float32))
found["launched"] = list(gpu_merges.EVER)
found["noticed"] = {{name: len(gpu_teeth.differences(name, few=True)) for name in {PLANTED}}}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Run the comparisons once, where the interpreter may patch Triton's language."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    report: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return report


def test_every_rule_and_statistic_has_the_bits_of_the_cpu(found: dict[str, Any]) -> None:
    assert found["different"] == []
    assert found["done"] > 300


def test_merges_write_the_files_of_the_cpu(found: dict[str, Any]) -> None:
    assert found["merges"] == []
    assert set(found["launched"]) >= {
        "weighted_sum",
        "task_vectors",
        "task_vectors_elect",
        "fisher_mean",
        "consensus",
        "largest_agreeing",
        "touches",
        "touched_merge",
        "count_digits_11",
        "narrow_10",
        "keys_in_window",
        "abs_sums",
    }


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_noticed(name: str, found: dict[str, Any]) -> None:
    assert found["noticed"][name] > 0
