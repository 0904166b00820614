"""The promise of `--memory`: the operating system's own account of the peak stays below it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.conftest import config_for

MIB = 1 << 20
LIMIT = 320 * MIB
TOOL = Path(__file__).parents[3] / "tools" / "make" / "make_models.py"
DIAGONALS = TOOL.with_name("make_diagonals.py")
SIZE = ["--layers", "1", "--hidden", "1024", "--inter", "2816", "--kv", "1024", "--vocab", "48000"]

_MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
os._exit(os.waitstatus_to_exitcode(status)) if status else None
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """A base and three fine-tunes, 217 MB each, of which 98 MB each are embedding and head."""
    directory = tmp_path_factory.mktemp("large")
    subprocess.run([sys.executable, TOOL, directory, "--models", "3", *SIZE], check=True, capture_output=True)
    paths = [directory / name for name in ("base", "tuned1", "tuned2", "tuned3")]
    yield paths
    shutil.rmtree(directory)


def store_of(model: Path) -> Path:
    """Make a diagonal of a model and import it, in processes of their own, within the limit."""
    diagonal, store = model.with_suffix(".safetensors"), model.with_suffix(".zarr")
    subprocess.run([sys.executable, DIAGONALS, model, diagonal], check=True, capture_output=True)
    command = [sys.executable, "-m", "streammerge.cli", "fisher", "import", model, diagonal, "--out", store]
    assert 50 * MIB < peak_of([*command, "--quiet", "--memory", "320MiB"]) < LIMIT
    diagonal.unlink()
    return store


def peak_of(command: Sequence[str | Path]) -> int:
    """Run a command and return its peak resident memory in bytes."""
    # Linux hands the peak of a forking process on to the child, so a small process has to do the forking.
    measured = subprocess.run(
        [sys.executable, "-c", _MEASURE, *command], capture_output=True, text=True, check=False
    )
    assert measured.returncode == 0, measured.stderr
    return int(measured.stdout.splitlines()[-1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("ties", {"density": 0.2}),
        ("fisher", {}),
        ("sce", {"select_topk": 0.5}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ],
    ids=["linear", "ties", "fisher", "sce", "nuslerp by columns"],
)
def test_peak_resident_memory_stays_below_the_limit(
    method: str, parameters: dict[str, Any], models: list[Path], tmp_path: Path
) -> None:
    config = config_for(method, models, parameters=parameters)
    if method == "fisher":
        models = models[:3]
        stores = [store_of(model) for model in models[1:]]
        config["models"] = [
            {"model": str(m), "fisher": str(s)} for m, s in zip(models[1:], stores, strict=True)
        ]
    if method == "linear":
        config["models"].append({"model": str(models[0])})
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "streammerge.cli", "merge", str(tmp_path / "config.yml"), str(out)]
    options = ["--memory", "320MiB", "--quiet", "--device", "cpu"]
    peak = peak_of([*command, *options])
    assert (out / "model.safetensors").stat().st_size > 200 * 10**6
    (out / "model.safetensors").unlink()
    assert 50 * MIB < peak < LIMIT


@pytest.mark.slow
def test_an_output_is_verified_against_its_inputs_below_the_limit(models: list[Path], tmp_path: Path) -> None:
    """The tensors are too large to hold beside torch: their statistics are streamed, as in a merge."""
    config, out = tmp_path / "config.yml", tmp_path / "out"
    config.write_text(yaml.safe_dump(config_for("ties", models[:3], parameters={"density": 0.2})))
    command = [sys.executable, "-m", "streammerge.cli"]
    merge = ["merge", str(config), str(out), "--memory", "320MiB", "--quiet", "--device", "cpu"]
    subprocess.run([*command, *merge], check=True)
    check = ["verify", str(out), "--against", str(config), "--sample", "1", "--seed", "1"]
    peak = peak_of([*command, *check, "--memory", "448MiB"])
    (out / "model.safetensors").unlink()
    assert 50 * MIB < peak < 448 * MIB


@pytest.mark.slow
def test_a_tensor_larger_than_the_limit_in_a_single_file_of_each_kind_stays_below_it(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    state = {"model.w.weight": torch.ones(1 << 18, 384, dtype=torch.float32)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "b.ckpt")
    models = [{"model": str(tmp_path / name)} for name in ("a.safetensors", "b.ckpt")]
    config = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "streammerge.cli", "merge", str(tmp_path / "config.yml"), str(out)]
    peak = peak_of([*command, "--memory", "320MiB", "--quiet", "--device", "cpu"])
    assert out.stat().st_size > LIMIT
    assert 50 * MIB < peak < LIMIT
    for path in tmp_path.iterdir():
        path.unlink()


@pytest.mark.slow
def test_an_adapter_of_a_matrix_larger_than_the_limit_is_extracted_below_it(tmp_path: Path) -> None:
    shape, limit = (189_000, 512), 368 * MIB
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}
    header = json.dumps({"model.layers.0.mlp.up_proj.weight": entry}).encode()
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
        with (tmp_path / name / "model.safetensors").open("wb") as file:  # all else is a hole in the file
            file.write(len(header).to_bytes(8, "little") + header)
            for row in (5, 70_000, shape[0] - 1) if name == "tuned" else ():
                file.seek(8 + len(header) + 4 * shape[1] * row)
                file.write((row * np.arange(shape[1])).astype(np.float32).tobytes())
            file.truncate(8 + len(header) + 4 * shape[0] * shape[1])
        assert (tmp_path / name / "model.safetensors").stat().st_size > limit
    command = [sys.executable, "-m", "streammerge.cli", "extract-lora", str(tmp_path / "tuned")]
    options = ["--base", str(tmp_path / "base"), "--rank", "1", "--memory", "368MiB", "--quiet"]
    peak = peak_of([*command, str(tmp_path / "out"), *options])
    assert 50 * MIB < peak < limit
    (told,) = json.loads((tmp_path / "out/streammerge.json").read_text())["adapter"]["modules"].values()
    assert told["norm"] > 1
    assert told["residual"] < 1e-6
