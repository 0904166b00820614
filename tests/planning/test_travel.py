"""A plan pickles and survives it: the copy is the plan, and another process merges it to the same bytes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.api import merge, plan
from streammerge.methods import catalog, registry
from streammerge.planning.description import describe, tensor_values
from streammerge.planning.plan import MergePlan
from tests.checkpoint.adapters.scene import factors, write_adapter, write_base
from tests.conftest import config_for, output_bytes, write_models
from tests.laws.test_methods import BUILTIN, VARIANTS
from tests.patience import PATIENCE

USER_METHOD = """
import streammerge
from shift import amount

@streammerge.method("shifted", base="none")
def shifted(models, base):
    '''The mean, shifted.'''
    return sum(models) / len(models) + amount
"""
ELSEWHERE = """
import pickle, sys
from pathlib import Path
from streammerge.engine.merge import Options, execute
from streammerge.events import Control
from streammerge.report.card import model_card

for path in map(Path, sys.argv[1:]):
    execute(pickle.loads(path.read_bytes()), path.with_suffix(".there"), Options(), Control(), model_card)
"""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_models(tmp_path_factory.mktemp("models"))


def survives(before: MergePlan) -> bytes:
    """Check that a plan equals its copy; return the pickle."""
    pickled = pickle.dumps(before)
    after = pickle.loads(pickled)
    assert after.method is before.method
    assert after.backend == before.backend
    assert describe(after) == describe(before)
    assert tensor_values(after) == tensor_values(before)
    assert after.identity() == before.identity()
    assert after.stamped == before.stamped
    assert list(after.steps()) == list(before.steps())
    return pickled


@pytest.mark.parametrize(("method", "parameters"), VARIANTS)
def test_the_plan_of_every_method_survives_pickling(
    method: str, parameters: dict[str, Any], paths: list[Path]
) -> None:
    for kernels in (True, False):
        decided = plan(config_for(method, paths, parameters=parameters), kernels=kernels)
        assert pickle.loads(survives(decided)) == decided


def test_every_method_that_ships_is_tried() -> None:
    assert {method for method, _ in VARIANTS} == set(BUILTIN)


def test_another_process_merges_a_pickled_plan_to_the_same_bytes(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry.all_methods()))
    (tmp_path / "shift.py").write_text("amount = 0.25\n")
    (tmp_path / "mine.py").write_text(USER_METHOD)
    catalog.load_file(tmp_path / "mine.py")
    base = write_base(tmp_path / "base", torch.float32)
    adapter = write_adapter(tmp_path / "adapter", factors("model.layers.0.q_proj", 24, 40, 8))
    first, second = map(str, paths[1:3])
    layers = {"layer_range": [0, 1]}
    slices = [{"sources": [{"model": first, **layers}, {"model": second, **layers}]}] * 3
    configs: dict[str, dict[str, Any]] = {
        "fisher": config_for("fisher", paths),
        "gram": config_for("regmean", paths),
        "adapted": {
            "merge_method": "linear",
            "models": [{"model": f"{base}+{adapter}"}, {"model": str(base)}],
        },
        "sliced": {"merge_method": "linear", "slices": slices},
        "user": {"merge_method": "shifted", "models": [{"model": first}, {"model": second}]},
    }
    for name, config in configs.items():
        config.setdefault("parameters", {} if name in ("user", "gram") else {"weight": 0.5})
        (tmp_path / f"{name}.plan").write_bytes(survives(plan(config)))
        merge(config, tmp_path / f"{name}.here", progress=False)
    plans = [str(tmp_path / f"{name}.plan") for name in configs]
    subprocess.run([sys.executable, "-c", ELSEWHERE, *plans], check=True, timeout=PATIENCE)
    for name in configs:
        assert output_bytes(tmp_path / f"{name}.there") == output_bytes(tmp_path / f"{name}.here"), name
