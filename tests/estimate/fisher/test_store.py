"""Stores of Fisher diagonals: what Zarr reads back, how they are made, and what is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from streammerge.api import merge, plan
from streammerge.checkpoint.companions import open_fisher
from streammerge.errors import OutputError
from streammerge.estimate.fisher.importing import import_diagonal
from streammerge.formats import zarr_writer as store
from streammerge.formats.zarr_chunks import ChunkedRef
from streammerge.formats.zarr_store import ATTRIBUTE
from tests.conftest import config_for, output_bytes, write_fisher, write_model
from tests.estimate.fisher.stores import (
    make_store,
    tree,
)

# --- what lies in a store


@pytest.mark.usefixtures("small_chunks")
def test_zarr_reads_every_array_back_under_its_tensors_name(paths: list[Path]) -> None:
    group = zarr.open_group(str(make_store(paths[1])), mode="r")
    expected = load_file(write_fisher(paths[1]))
    assert set(group.array_keys()) == set(expected)
    for name, tensor in expected.items():
        array = group[name]
        assert array.dtype == np.float32
        assert array.shape == tuple(tensor.shape)
        assert np.array_equal(array[...], tensor.numpy())


@pytest.mark.usefixtures("small_chunks")
def test_the_attributes_hold_the_sums_and_the_model(paths: list[Path]) -> None:
    out = make_store(paths[1], about={"estimator": "exact", "examples": 32, "seed": 7})
    about = dict(zarr.open_group(str(out), mode="r").attrs[ATTRIBUTE])
    expected = {n: t.double().numpy() for n, t in load_file(write_fisher(paths[1])).items()}
    assert (about["estimator"], about["examples"], about["seed"], about["dtype"]) == ("exact", 32, 7, "F32")
    assert about["model_name"] == "m1"
    assert len(about["model_fingerprint"]) == 32
    norm = math.sqrt(sum(float((f * f).sum()) for f in expected.values()))
    assert about["norm"] == pytest.approx(norm, rel=1e-12)
    for name, f in expected.items():
        entry = about["tensors"][name]
        assert entry["sum"] == pytest.approx(f.sum(), rel=1e-12)
        assert entry["square_sum"] == pytest.approx((f * f).sum(), rel=1e-12)
        assert entry["largest"] == f.max(initial=0.0)
        assert entry["zeros"] == int((f == 0).sum())
        files = [p for p in (out / entry["array"] / "c").rglob("*") if p.is_file()]
        files += [out / entry["array"] / "c"] if not f.shape else []
        assert entry["stored_nbytes"] == sum(p.stat().st_size for p in files)


@given(st.lists(st.integers(1, 12), max_size=4), st.integers(1, 3000))
@settings(max_examples=100, deadline=None)
def test_chunks_tile_a_tensor_in_the_order_of_its_elements(shape: list[int], size: int) -> None:
    before = store.CHUNK_ELEMENTS
    store.CHUNK_ELEMENTS = size
    try:
        chunk = store.chunk_shape(tuple(shape))
        runs = list(store.chunk_runs(tuple(shape)))
    finally:
        store.CHUNK_ELEMENTS = before
    n = math.prod(shape)
    ref = ChunkedRef("t", "F32", tuple(shape), "/s", chunk, 0.0, 0)
    found = list(ref.chunks(0, n))
    assert [(a, b) for _, a, b in found] == runs
    assert runs[0][0] == 0
    assert runs[-1][1] == n
    assert all(b == c for (_, b), (c, _) in pairwise(runs))
    assert len({path for path, _, _ in found}) == len(found)
    assert math.prod(chunk) <= max(size, 1)
    for start, stop in ((0, 1), (n // 2, n // 2 + 1), (n // 3, n)):
        inside = list(ref.chunks(start, stop))
        assert inside == [f for f in found if f[1] < stop and f[2] > start]


@pytest.mark.parametrize(
    "name", ["a/b", "../../x", "/abs", "..", "__x", "naïve", "with\nnewline", "x" * 300, "zarr.json", "%"]
)
def test_a_name_no_directory_can_bear_is_escaped_and_stays_inside(name: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", {name: torch.randn(3, 4), "w": torch.randn(2)})
    fisher = {name: torch.rand(3, 4), "w": torch.rand(2)}
    save_file(fisher, tmp_path / "f.safetensors")
    before = set(tmp_path.iterdir())
    import_diagonal(model, tmp_path / "f.safetensors", tmp_path / "s.zarr")
    assert set(tmp_path.iterdir()) - before == {tmp_path / "s.zarr"}
    index = open_fisher(tmp_path / "s.zarr")
    assert set(index) == {name, "w"}
    config = {"merge_method": "fisher", "models": [{"model": str(model), "fisher": str(tmp_path / "s.zarr")}]}
    merge(config, tmp_path / "out", memory="1GiB")
    assert len(zarr.open_group(str(tmp_path / "s.zarr"), mode="r")) == 2


def test_bfloat16_is_rounded_once_and_kept_as_patterns(paths: list[Path]) -> None:
    group = zarr.open_group(str(make_store(paths[1], dtype="BF16")), mode="r")
    for name, tensor in load_file(write_fisher(paths[1])).items():
        expected = tensor.bfloat16().view(torch.int16).numpy().view(np.uint16)
        assert group[name].dtype == np.uint16
        assert np.array_equal(group[name][...], expected)


def test_a_pytorch_file_gives_the_same_store(paths: list[Path], tmp_path: Path) -> None:
    expected = tree(make_store(paths[1]))
    torch.save(load_file(write_fisher(paths[1])), tmp_path / "f.pt")
    import_diagonal(paths[1], tmp_path / "f.pt", tmp_path / "s.zarr")
    found = tree(tmp_path / "s.zarr")
    arrays = {name for name in expected if "/" in name}
    assert {name: found[name] for name in arrays} == {name: expected[name] for name in arrays}


# --- merging with stores


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("method", ["fisher", "dare_fisher"])
@pytest.mark.parametrize("capacity", [1 << 30, 1 << 18])
def test_stores_and_files_merge_to_the_same_bytes_at_any_memory(
    method: str, capacity: int, paths: list[Path], small_capacity: Callable[[int, int], None], tmp_path: Path
) -> None:
    parameters = {"density": 0.5, "rescale": "l1"} if method == "dare_fisher" else {}
    config = config_for(method, paths, parameters=parameters)
    merge(config, tmp_path / "files", memory="1GiB")
    for model, path in zip(config["models"], paths[1:], strict=True):
        model["fisher"] = str(make_store(path))
    small_capacity(capacity, 3)
    merge(config, tmp_path / "stores")
    expected, found = output_bytes(tmp_path / "files"), output_bytes(tmp_path / "stores")
    assert found["model.safetensors"] == expected["model.safetensors"]
    del config["models"][0]["fisher"]
    config["models"][0]["fisher"] = str(write_fisher(paths[1]))  # a file and stores
    merge(config, tmp_path / "mixed")
    assert output_bytes(tmp_path / "mixed")["model.safetensors"] == expected["model.safetensors"]


def test_a_bfloat16_store_merges_as_its_rounded_values_would(paths: list[Path], tmp_path: Path) -> None:
    config = config_for("fisher", paths)
    for model, path in zip(config["models"], paths[1:], strict=True):
        rounded = {n: t.bfloat16().float() for n, t in load_file(write_fisher(path)).items()}
        save_file(rounded, tmp_path / f"{path.name}-rounded.safetensors")
        model["fisher"] = str(tmp_path / f"{path.name}-rounded.safetensors")
    merge(config, tmp_path / "files", memory="1GiB")
    for model, path in zip(config["models"], paths[1:], strict=True):
        model["fisher"] = str(make_store(path, dtype="BF16"))
    merge(config, tmp_path / "stores", memory="1GiB")
    assert (
        output_bytes(tmp_path / "stores")["model.safetensors"]
        == output_bytes(tmp_path / "files")["model.safetensors"]
    )


def test_a_store_makes_normalising_free_and_a_file_costs_one_pass_over_itself(paths: list[Path]) -> None:
    config = config_for("fisher", paths)
    files = plan(config, memory="1GiB")
    for model, path in zip(config["models"], paths[1:], strict=True):
        model["fisher"] = str(make_store(path))
    stores = plan(config, memory="1GiB")
    assert (files.model_passes(), stores.model_passes()) == (1, 0)
    weights = sum(job.input_bytes for job in files.jobs)
    diagonals = sum(job.fisher_bytes for job in files.jobs)
    assert files.bytes_to_read() == weights + 2 * diagonals
    assert stores.bytes_to_read() == weights + sum(job.fisher_bytes for job in stores.jobs)


def test_each_chunk_is_read_once_and_in_order(
    paths: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    small_capacity: Callable[[int, int], None],
    tmp_path: Path,
) -> None:
    from streammerge.io.reader import Reader

    monkeypatch.setattr(store, "CHUNK_ELEMENTS", 4096)
    config = config_for("fisher", paths)
    for model, path in zip(config["models"], paths[1:], strict=True):
        model["fisher"] = str(make_store(path))
    reads: list[str] = []
    real = Reader.read_file
    monkeypatch.setattr(
        Reader, "read_file", lambda self, path, target: (reads.append(path), real(self, path, target))[1]
    )
    small_capacity(1 << 19, 1)
    merge(config, tmp_path / "out")
    assert len(reads) > 30
    assert len(reads) == len(set(reads))


# --- the command line


def test_info_names_totals_shares_and_what_is_undecided(paths: list[Path]) -> None:
    out = make_store(paths[1], about={"estimator": "exact", "examples": 9})
    command = [sys.executable, "-m", "streammerge.cli", "fisher", "info", str(out)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "exact, 9 examples" in text
    assert "layers.0" in text
    assert "undecided: " in text
    shares = [
        float(line.split("%")[0]) for line in text.split("share of the sum, by layer:")[1].splitlines()[1:6]
    ]
    assert sum(shares) == pytest.approx(100.0, abs=0.1)
    about = json.loads(
        subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    )
    assert about["examples"] == 9


def test_a_merge_that_a_floor_decides_says_so(paths: list[Path], tmp_path: Path) -> None:
    parameters = {"floor": 1e-2, "floor_units": "raw", "normalize": False}
    said: list[Any] = []
    summary = merge(
        config_for("fisher", paths, parameters=parameters),
        tmp_path / "out",
        memory="1GiB",
        on_event=said.append,
    )
    assert summary.floored is not None
    assert summary.floored["fraction"] > 0.99
    assert any("the floor decided" in event.values.get("message", "") for event in said)


def test_a_store_is_not_a_place_to_merge_into(paths: list[Path]) -> None:
    config = config_for("fisher", paths)
    out = make_store(paths[1])
    config["models"][0]["fisher"] = str(out)
    with pytest.raises(OutputError, match="is the input"):
        merge(config, out)
    assert os.path.isdir(out / "embed")
