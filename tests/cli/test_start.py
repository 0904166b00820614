"""What a command imports before it answers: little, so that a mistake in a config is told at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from streammerge.backends.cpu.compile import compile_kernels
from tests.conftest import config_for
from tests.patience import PATIENCE

RUN = """
import json, sys
from streammerge.cli import main
try:
    main()
finally:
    print(json.dumps(sorted(sys.modules)))
"""


def imported(*arguments: str | Path) -> set[str]:
    """Return the modules that a command has imported when it ends."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_config_is_refused_before_what_plans_is_imported(tmp_path: Path) -> None:
    config = tmp_path / "bad.yml"
    config.write_text("merge_method: no such method\nmodels: [{model: a}, {model: b}]\n")
    names = imported("plan", config)
    assert "streammerge.methods.registry" in names
    assert not {
        name for name in names if name.startswith(("streammerge.planning", "streammerge.engine", "numba"))
    }


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "slerp"])
def test_neither_a_plan_nor_a_merge_imports_a_compiler(
    method: str, make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    compile_kernels(
        ["abs_sums", "dots", "ranks", "rows", "task_vectors", "undecided", "weighted_sum", "words"]
    )
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(config_for(method, make_models())))
    heavy = {"numba", "torch", "scipy", "rich", "safetensors", "transformers", "importlib.metadata"}
    if method == "linear":
        assert not heavy & imported("plan", config)
    names = imported("merge", config, tmp_path / "out")
    assert not heavy & names
    assert (
        not {"streammerge.methods.papers.della", "streammerge.cli.sweeping", "streammerge.api.reporting"}
        & names
    )
