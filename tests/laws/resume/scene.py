"""A small merge, what it gives when nothing interrupts it, and how to interrupt it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from streammerge.api import merge
from streammerge.engine.merge import Summary
from tests.conftest import config_for, output_bytes, use_capacity, write_models

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (300, 64),
    "layers.0.weight": (64, 130),
    "layers.1.weight": (64, 130),
    "norm": (64,),
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ties": ("ties", {"density": 0.2, "trim_scope": "model"}, {"shard_size": 30_000}),
    "dare": ("dare_linear", {"density": 0.4}, {}),
    "fisher": ("fisher", {}, {}),
}


class SimulatedKill(BaseException):
    """Ends a merge as nothing in it expects."""


class Scene:
    """One merge and what it gives when nothing interrupts it."""

    def __init__(self, case: str, paths: list[Path], directory: Path) -> None:
        method, parameters, options = CASES[case]
        self.case = case
        self.options = dict(options)  # tests change it
        self.paths = paths
        self.config = config_for(method, paths, parameters=parameters, seed=3)
        self.directory = directory
        self.merge(directory / "expected")
        self.expected = output_bytes(directory / "expected")

    def merge(self, out: Path, **options: Any) -> Summary:
        config = options.pop("config", self.config)
        return merge(config, out, **{**self.options, **options})

    def assert_finished(self, out: Path) -> None:
        """Every file is there, byte for byte, and nothing else."""
        assert sorted(p.name for p in out.iterdir()) == sorted(self.expected)
        assert output_bytes(out) == self.expected

    def assert_nothing_torn(self, out: Path) -> None:
        """A final name means a finished file; what loads is a finished model."""
        if not out.exists():
            return
        files = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
        loads = {"model.safetensors", "model.safetensors.index.json"} & set(files)
        final = {name for name in files if not name.endswith(".partial")}
        assert final <= set(self.expected)
        assert all(files[name] == self.expected[name] for name in final)
        if loads:
            assert final == set(self.expected)


def make_scene(case: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Write the models of a case and merge them once, with buffers so small that the work is cut to pieces."""
    use_capacity(monkeypatch, 1 << 17, 1)
    # Nothing here cuts the power, and waiting for the disk is most of the time of a small merge.
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)
    paths = write_models(directory, n_models=2, shapes=SHAPES)
    for path in paths:
        (path / "tokenizer.json").write_text(f"{{}} of {path.name}")
    return Scene(case, paths, directory)


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Change one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def flip_middle_of_a_tensor(path: Path) -> None:
    """Change a bit of an exponent-free byte in the middle of the largest tensor."""
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    first, last = header["embed.weight"]["data_offsets"]
    flip(path, 8 + length + (first + last) // 4 * 2)
