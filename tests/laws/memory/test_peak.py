"""The promise of `--memory`: the operating system's own account of the peak stays below it."""

from __future__ import annotations

import json
import math
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
sys.path.insert(0, str(Path(__file__).parents[3] / "tools" / "make"))

from make_models import bf16, header, shapes  # noqa: E402

SIZE = {"layers": 1, "hidden": 1024, "inter": 2816, "kv": 1024, "vocab": 48_000}
NOISE = 1 << 21
"""Values drawn at random; a tensor repeats them from a place of its own. Drawing all would take most of these tests' time."""

_MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
os._exit(os.waitstatus_to_exitcode(status)) if status else None
"""


def fill(path: Path, start: bytes, values: np.ndarray) -> None:
    """Write a file of such tensors: the header, and values for each."""
    with path.open("wb") as file:
        file.write(start)
        for place, (_, shape) in enumerate(sorted(shapes(**SIZE))):
            tensor = np.resize(np.roll(values, 997 * place), math.prod(shape))
            file.write(tensor.tobytes())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """A base and three fine-tunes, 217 MB each, of which 98 MB each are embedding and head."""
    directory, random = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    base = random.standard_normal(NOISE, np.float32) * np.float32(0.02)
    start, _ = header(list(shapes(**SIZE)))
    paths = [directory / name for name in ("base", "tuned1", "tuned2", "tuned3")]
    for place, path in enumerate(paths):
        path.mkdir()
        (path / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
        delta = random.standard_normal(NOISE, np.float32) * np.float32(1e-3)
        fill(path / "model.safetensors", start, bf16(base + delta if place else base))
    yield paths
    shutil.rmtree(directory)


def diagonal_of(model: Path) -> Path:
    """Write a diagonal of a model, of values that do not compress."""
    random, path = np.random.default_rng(1), model.with_suffix(".safetensors")
    entries, end = {}, 0
    for name, shape in sorted(shapes(**SIZE)):
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * math.prod(shape)]}
        end += 4 * math.prod(shape)
    text = json.dumps(entries).encode()
    fill(
        path,
        len(text).to_bytes(8, "little") + text,
        np.exp(random.standard_normal(NOISE, np.float32) * 2.5 - 20),
    )
    return path


def store_of(model: Path) -> Path:
    """Import a diagonal of a model, in a process of its own, within the limit."""
    diagonal, store = diagonal_of(model), model.with_suffix(".zarr")
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
        ("fisher", {}),
        ("sce", {"select_topk": 0.5}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ],
    ids=["linear", "fisher", "sce", "nuslerp by columns"],
)
def test_peak_resident_memory_stays_below_the_limit(
    method: str, parameters: dict[str, Any], models: list[Path], tmp_path: Path
) -> None:
    if method == "fisher":
        diagonals = {models[1]: store_of(models[1]), models[2]: diagonal_of(models[2])}
        listed = [{"model": str(model), "fisher": str(place)} for model, place in diagonals.items()]
        config: dict[str, Any] = {"merge_method": "fisher", "models": listed, "parameters": parameters}
    else:
        config = config_for(method, models, parameters=parameters)
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
def test_a_merge_by_statistics_and_its_verification_against_the_inputs_stay_below_the_limit(
    models: list[Path], tmp_path: Path
) -> None:
    """The tensors are too large to hold beside torch: their statistics are streamed, as in a merge."""
    config, out = tmp_path / "config.yml", tmp_path / "out"
    config.write_text(yaml.safe_dump(config_for("ties", models[:3], parameters={"density": 0.2})))
    command = [sys.executable, "-m", "streammerge.cli"]
    merge = ["merge", str(config), str(out), "--memory", "320MiB", "--quiet", "--device", "cpu"]
    assert 50 * MIB < peak_of([*command, *merge]) < LIMIT
    assert (out / "model.safetensors").stat().st_size > 200 * 10**6
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
