"""A merge of models in memory takes little in addition to them, by the operating system's own account."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.patience import PATIENCE

SCRIPT = """
import json, torch
from pathlib import Path
from streammerge import iter_merged, merge_state_dicts
from streammerge.machine import own_memory, peak_memory

models = {key: {f"w{i}": torch.full((1 << 21,), float(i)) for i in range(8)} for key in "abc"}
config = {"merge_method": "ties", "base_model": "a", "models": ["b", "c"], "parameters": {"density": 0.5}}

def peak(action):
    before = own_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    held = action()
    return peak_memory() - before

options = {"memory": "264MiB", "kernels": True, "progress": False, "threads": 2}
merge_state_dicts(config, {key: {"w": torch.ones(4)} for key in "abc"}, **options)  # libraries are loaded
print(json.dumps([
    peak(lambda: merge_state_dicts(config, models, **options)),
    peak(lambda: max(float(t[0]) for _, t in iter_merged(config, models, **options))),
]))
"""
MIB = 1 << 20


def test_inputs_are_not_copied_and_the_loop_holds_few_tensors() -> None:
    """Three models of 64 MiB; `memory` leaves 40 MiB for buffers, and no tensor's statistics fit in them."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    whole, loop = json.loads(done.stdout)
    assert 64 * MIB <= whole < (64 + 40 + 50) * MIB
    assert loop < (6 * 8 + 40 + 50) * MIB
