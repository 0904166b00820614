"""Make models of the shapes that are hardest on memory: one giant row, one giant 1-D tensor, many tiny ones, many models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

MAKE = Path(__file__).resolve().parents[1] / "make"
sys.path.append(str(MAKE))

from make_models import BLOCK, bf16, header  # noqa: E402

CONFIG = '{"model_type": "llama", "torch_dtype": "bfloat16"}\n'


@dataclass(frozen=True)
class Family:
    """A base and fine-tunes of it, all of one shape."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    """Names and shapes."""
    n_models: int
    """Beside the base."""


FAMILIES = {
    "row": Family((("row.weight", (3, 16_000_000)), ("norm.weight", (64,))), 3),
    "vector": Family((("vector.weight", (48_000_000,)), ("norm.weight", (64,))), 3),
    "tiny": Family(tuple((f"model.layers.{i}.mlp.experts.gate.weight", (16,)) for i in range(100_000)), 3),
    "models": Family(
        (("embed.weight", (8192, 1024)), ("a.weight", (1024, 1024)), ("b.weight", (1024, 1024)), ("norm.weight", (1024,))),
        64,
    ),
    "tiny64": Family(tuple((f"model.layers.{i}.mlp.experts.gate.weight", (16,)) for i in range(10_000)), 64),
    "fisher": Family(tuple((f"model.layers.{i}.mlp.experts.gate.weight", (16,)) for i in range(20_000)), 3),
}  # fmt: skip


def make_family(directory: Path, family: Family) -> list[Path]:
    """Write the models of a family unless they are there; return their directories, the base first."""
    names = ["base", *(f"tuned{i + 1}" for i in range(family.n_models))]
    paths = [directory / name for name in names]
    for seed, path in enumerate(paths):
        if not (path / "config.json").exists():
            path.mkdir(parents=True, exist_ok=True)
            _write(path / "model.safetensors", family, seed)
            (path / "config.json").write_text(CONFIG)
    return paths


def _write(path: Path, family: Family, seed: int) -> None:
    """Write one model, a block of elements at a time: normal weights and, beside the base, normal noise on them."""
    start, _ = header(list(family.tensors))
    n = sum(prod(shape) for _, shape in family.tensors)
    with path.open("wb") as file:
        file.write(start)
        for block, first in enumerate(range(0, n, BLOCK)):
            size = min(BLOCK, n - first)
            values = np.random.default_rng(block).standard_normal(size, np.float32) * np.float32(0.02)
            if seed:
                noise = np.random.default_rng([seed, block]).standard_normal(size, np.float32)
                values += noise * np.float32(1e-3)
            file.write(bf16(values).tobytes())


def make_stores(paths: Sequence[Path]) -> list[Path]:
    """Import a synthetic Fisher diagonal for each model unless it is there; return the stores."""
    stores = []
    for seed, path in enumerate(paths):
        store, diagonal = path.with_suffix(".zarr"), path.with_suffix(".safetensors")
        if not store.exists():
            make = [sys.executable, MAKE / "make_diagonals.py", path, diagonal]
            subprocess.run([*make, "--seed", str(seed)], check=True, stdout=subprocess.DEVNULL)
            command = [sys.executable, "-m", "streammerge.cli", "fisher", "import", path, diagonal]
            subprocess.run([*command, "--out", store, "--quiet"], check=True)
            diagonal.unlink()
        stores.append(store)
    return stores


def config(
    method: str, paths: Sequence[Path], parameters: Mapping[str, object], fishers: Sequence[Path] = ()
) -> str:
    """Return the config of a merge of some models, the base first, as JSON, which is YAML."""
    models: list[dict[str, object]] = [{"model": str(path)} for path in paths[1:]]
    for model, fisher in zip(models, fishers, strict=False):
        model["fisher"] = str(fisher)
    value: dict[str, object] = {"merge_method": method, "models": models, "parameters": dict(parameters)}
    if method not in ("linear", "fisher"):
        value["base_model"] = str(paths[0])
    return json.dumps(value)
