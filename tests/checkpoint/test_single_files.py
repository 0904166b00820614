"""Single files as models: every kind that people have, in every command, and nothing in one is ever run."""

from __future__ import annotations

import argparse
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from streammerge import compare, merge, plan, verify
from streammerge.checkpoint import open_model
from streammerge.cli.showing import inspect
from streammerge.errors import ModelError
from tests.conftest import write_fisher, write_model

State = dict[str, torch.Tensor]
MARKER: list[str] = []


class Callback:
    """A class of a trainer, which a checkpoint names; whoever makes one of it or fills it is found out."""

    def __new__(cls, *arguments: object) -> Callback:
        MARKER.append("made")
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        MARKER.append("filled")


def callback() -> Callback:
    made = object.__new__(Callback)
    made.__dict__["best"] = 0.25
    return made


def lightning(state: State) -> dict[str, Any]:
    """Return what PyTorch Lightning saves, roughly, with objects of classes that are not torch's."""
    moments = {"exp_avg": torch.zeros(4), "step": torch.tensor(3.0)}
    return {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "2.1",
        "state_dict": OrderedDict(state),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"Checkpoint": callback()},
        "optimizer_states": [{"state": {0: moments}, "param_groups": [{"lr": 1e-4}]}],
        "hyper_parameters": argparse.Namespace(lr=1e-4),
    }


# (the file's name, what is saved in it, entries that a note names)
FILES: list[tuple[str, Callable[[State], Any], list[str]]] = [
    ("plain.safetensors", dict, []),
    ("plain.pt", dict, []),
    ("parameters.pt", lambda state: {n: torch.nn.Parameter(t) for n, t in state.items()}, []),
    ("old.pth", OrderedDict, []),
    ("engine.bin", lambda s: {"module": s, "optimizer": {"state": {}}, "lr_scheduler": None}, ["optimizer"]),
    (
        "trainer.pt",
        lambda s: {"model": s, "optimizer": {"state": {}}, "args": argparse.Namespace()},
        ["args"],
    ),
    ("nested.pt", lambda s: {"state_dict": {"model": s, "epoch": 1}}, ["epoch"]),
    ("lightning.ckpt", lightning, ["optimizer_states", "epoch"]),
    (
        "flat.ckpt",
        lambda s: {**s, "global_step": 7, "hparams": argparse.Namespace(), "cb": callback()},
        ["hparams"],
    ),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write a base and two fine-tunes as folders."""
    folder, generator = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(1)
    names = [f"model.layers.{i}.weight" for i in range(2)] + ["model.norm.weight"]
    shapes = [(24, 16), (24, 16), (16,)]
    base = [torch.randn(shape, generator=generator) for shape in shapes]
    paths = []
    for place in range(3):
        noisy = [t + 0.1 * place * torch.randn(t.shape, generator=generator) for t in base]
        paths.append(write_model(folder / f"m{place}", dict(zip(names, noisy, strict=True))))
    return paths


def save(folder: Path, target: Path, build: Callable[[State], Any]) -> Path:
    state = load_file(folder / "model.safetensors")
    if target.suffix == ".safetensors":
        save_file(state, target)
    else:
        torch.save(build(state), target, _use_new_zipfile_serialization=target.suffix != ".pth")
    return target


@pytest.mark.parametrize(("name", "build", "told"), FILES, ids=[row[0] for row in FILES])
def test_it_is_a_model_in_every_command(
    name: str, build: Callable[[State], Any], told: list[str], folders: list[Path], tmp_path: Path
) -> None:
    files = [save(folder, tmp_path / f"{i} {name}", build) for i, folder in enumerate(folders)]
    MARKER.clear()
    index = open_model(files[1])
    assert set(index) == set(open_model(folders[1]))
    assert len(index.notes) == bool(told)
    assert all(f"'{entry}'" in index.notes[0] for entry in told)
    shown = CliRunner().invoke(inspect, [str(files[1])])
    assert shown.exit_code == 0
    assert "model.layers.0.weight" in shown.output
    config = {"merge_method": "ties", "base_model": str(files[0]), "parameters": {"density": 0.5}}
    config["models"] = [{"model": str(path)} for path in files[1:]]
    assert len(plan(config).jobs) == 3
    merge(config, tmp_path / "out.safetensors")
    alike = {
        **config,
        "base_model": str(folders[0]),
        "models": [{"model": str(path)} for path in folders[1:]],
    }
    merge(alike, tmp_path / "alike.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "alike.safetensors").read_bytes()
    assert verify(tmp_path / "out.safetensors", against=config, sample=None).problems == ()
    cosines = [compare(paths[1:], base=paths[0], progress=False).cosines for paths in (files, folders)]
    assert cosines[0] == cosines[1]
    assert MARKER == []


def test_it_has_a_fisher_diagonal_like_any_model(folders: list[Path], tmp_path: Path) -> None:
    files = [save(folder, tmp_path / f"{folder.name}.ckpt", lightning) for folder in folders[1:]]
    outs = []
    for paths in (files, folders[1:]):
        models = [
            {"model": str(path), "fisher": str(write_fisher(folder))}
            for path, folder in zip(paths, folders[1:], strict=True)
        ]
        outs.append(tmp_path / f"{len(outs)}.safetensors")
        merge({"merge_method": "fisher", "models": models}, outs[-1])
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_a_foreign_object_in_a_parameters_place_is_refused(folders: list[Path], tmp_path: Path) -> None:
    state = load_file(folders[0] / "model.safetensors")
    torch.save({"state_dict": {**state, "model.layers.1.weight": callback()}}, tmp_path / "x.ckpt")
    MARKER.clear()
    with pytest.raises(
        ModelError, match=r"'model\.layers\.1\.weight' is no tensor but an object that needs '.*Callback'"
    ):
        open_model(tmp_path / "x.ckpt")
    assert MARKER == []
    pickle.loads(pickle.dumps(callback()))
    assert MARKER, "the trap works"


def test_files_of_several_kinds_merge_with_each_other_and_with_folders(
    folders: list[Path], tmp_path: Path
) -> None:
    one = save(folders[1], tmp_path / "one.ckpt", lightning)
    two = save(folders[2], tmp_path / "two.safetensors", dict)
    config = {"merge_method": "task_arithmetic", "base_model": str(folders[0])}
    config["models"] = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (one, two)]
    merge(config, tmp_path / "out")
    base, *others = (load_file(folder / "model.safetensors") for folder in folders)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in merged.items():
        wanted = base[name].double() + 0.5 * sum(
            other[name].double() - base[name].double() for other in others
        )
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-6)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
