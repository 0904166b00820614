"""Stores and diagonals that are refused: of another model, damaged, malformed, without room."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from streammerge.api import merge, plan
from streammerge.checkpoint.companions import open_fisher
from streammerge.errors import BudgetError, ModelError, StreammergeError
from streammerge.estimate.fisher.importing import import_diagonal
from streammerge.events import Control
from streammerge.formats.zarr_store import ATTRIBUTE
from tests.conftest import config_for, write_fisher
from tests.estimate.fisher.stores import (
    entry,
    make_store,
)

# --- refusals


def test_a_store_of_another_model_is_refused_naming_both(paths: list[Path], tmp_path: Path) -> None:
    config = config_for("fisher", paths)
    config["models"][0]["fisher"] = str(make_store(paths[2]))
    with pytest.raises(
        ModelError, match=r"m2\.zarr: this Fisher diagonal belongs to model 'm2' .* not to .*m1"
    ):
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "longer"])
def test_a_damaged_chunk_is_named(damage: str, paths: list[Path], tmp_path: Path) -> None:
    config = config_for("fisher", paths)
    out = make_store(paths[1])
    config["models"][0]["fisher"] = str(out)
    chunk = out / "embed" / "c" / "1" / "0"
    raw = bytearray(chunk.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
    if damage == "cut":
        raw = raw[: len(raw) // 2]
    if damage == "longer":
        raw += bytes(10**6)
    chunk.write_bytes(raw)
    if damage == "missing":
        chunk.unlink()
    with pytest.raises(ModelError, match=str(chunk)):
        merge(config, tmp_path / "out", memory="1GiB")
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-9])
def test_a_value_that_is_no_certainty_is_refused_by_tensor_and_element(
    value: float, paths: list[Path], tmp_path: Path
) -> None:
    source = write_fisher(paths[1])
    tensors = load_file(source)
    tensors["layers.0.w"].view(-1)[777] = value
    save_file(tensors, source)
    with pytest.raises(ModelError, match=r"layers\.0\.w.*element 777"):
        import_diagonal(paths[1], source, tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()
    for parameters in ({}, {"normalize": False, "floor": 0.0}):
        with pytest.raises(ModelError, match=r"m1-fisher.*layers\.0\.w.*element 777"):
            merge(config_for("fisher", paths, parameters=parameters), tmp_path / "out", memory="1GiB")
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("norm"), "3 tensors"),
        (lambda f: f.update(more=torch.ones(3)), "more is not in"),
        (lambda f: f.update(norm=torch.ones(3)), r"norm has shape \[3\]"),
        (lambda f: f.update(norm=torch.ones(4099, dtype=torch.int32)), "norm is I32, not a float"),
    ],
)
def test_names_shapes_and_dtypes_must_be_the_models(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, paths: list[Path], tmp_path: Path
) -> None:
    fisher = load_file(write_fisher(paths[1]))
    change(fisher)
    save_file(fisher, tmp_path / "f.safetensors")
    if "tensors" in message:  # an incomplete diagonal is imported, and a merge refuses what it lacks
        said: list[Any] = []
        import_diagonal(
            paths[1], tmp_path / "f.safetensors", tmp_path / "s.zarr", control=Control(said.append)
        )
        assert any("1 tensors" in event.values.get("message", "") for event in said)
        config = config_for("fisher", paths)
        config["models"][0]["fisher"] = str(tmp_path / "s.zarr")
        with pytest.raises(ModelError, match=r"the Fisher diagonal of tensor norm is missing.*exclude"):
            plan(config)
        plan({**config, "exclude": ["norm"]})
        return
    with pytest.raises(ModelError, match=message):
        import_diagonal(paths[1], tmp_path / "f.safetensors", tmp_path / "s.zarr")


def test_a_tensor_without_a_diagonal_in_any_model_takes_the_fallback(
    paths: list[Path], tmp_path: Path
) -> None:
    config = config_for("fisher", paths)
    for path in paths[1:]:
        fisher = load_file(write_fisher(path))
        fisher.pop("norm")
        save_file(fisher, write_fisher(path))
    decided = plan(config)
    assert any("1 tensors have no Fisher diagonal" in warning for warning in decided.warnings)
    merge(config, tmp_path / "target", memory="1GiB")
    merged = load_file(tmp_path / "target" / "model.safetensors")["norm"]
    assert torch.equal(merged, load_file(paths[1] / "model.safetensors")["norm"])
    merge({**config, "parameters": {"fallback": "average"}}, tmp_path / "average", memory="1GiB")
    linear = config_for("linear", paths)
    merge(linear, tmp_path / "linear", memory="1GiB")
    averages = [load_file(tmp_path / name / "model.safetensors")["norm"] for name in ("average", "linear")]
    assert torch.equal(*averages)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda g: g["attributes"].clear(), "unfinished"),
        (lambda g: g.update(zarr_format=2), "unfinished"),
        (lambda g: g["attributes"][ATTRIBUTE].update(format=99), "format '99'"),
        (lambda g: g["attributes"][ATTRIBUTE].update(tensors={}), "empty"),
        (lambda g: entry(g).update(array="../../x"), "not a plain name"),
        (lambda g: entry(g).update(array="/x"), "not a plain name"),
        (lambda g: entry(g).update(dtype="F16"), "dtype"),
        (lambda g: entry(g).update(shape=[10**12, 10**12]), "runs of elements|another model"),
        (lambda g: entry(g).update(shape=[-1]), "list of sizes"),
        (lambda g: entry(g).update(chunk=[3, 7]), "runs of elements"),
        (lambda g: entry(g).update(chunk=[1 << 40, 64]), "larger than 2 GiB"),
        (lambda g: entry(g).update(square_sum="much"), "square_sum"),
        (lambda g: entry(g).update(zeros=-1), "zeros"),
        (lambda g: entry(g).update(stored_nbytes=True), "stored_nbytes"),
    ],
)
def test_a_malformed_table_is_refused_in_one_line(
    edit: Callable[[dict[str, Any]], Any], message: str, paths: list[Path]
) -> None:
    out = make_store(paths[1])
    config = config_for("fisher", paths)
    config["models"][0]["fisher"] = str(out)
    group = json.loads((out / "zarr.json").read_text())
    edit(group)
    (out / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(ModelError, match=message) as refused:
        plan(config)
    assert "\n" not in str(refused.value)


def test_what_is_no_diagonal_is_refused(paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pt").write_bytes(b"")
    for path, message in [("empty", "neither a Zarr store"), ("none", "no such"), ("x.pt", "fisher import")]:
        with pytest.raises(ModelError, match=message):
            open_fisher(tmp_path / path)
    config = config_for("fisher", paths)
    del config["models"][1]["fisher"]
    with pytest.raises(StreammergeError, match=r"models\[1\].*`fisher: PATH`"):
        plan(config)
    config = config_for("linear", paths)
    config["models"][1]["fisher"] = str(write_fisher(paths[1]))
    with pytest.raises(StreammergeError, match="takes no Fisher"):
        plan(config)


def test_an_import_that_does_not_fit_the_memory_is_refused_before_it_begins(
    paths: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match="give at least"):
        import_diagonal(paths[1], write_fisher(paths[1]), tmp_path / "s.zarr", memory=100 << 20)
    assert list(tmp_path.glob("s.zarr*")) == []
