"""One safetensors file as the output: its bytes, what its header says, what is verified, what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streammerge.api import merge, plan, verify
from streammerge.cli.merging import plan as plan_command
from streammerge.errors import InputError, ModelError, OutputError
from tests.conftest import config_for
from tests.laws.resume.scene import flip

KEPT = {
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "modelspec.title": "Some Mix",
    "config": "{}",
}
DROPPED = {"modelspec.hash_sha256": "0x00", "modelspec.thumbnail": "data:", "ss_learning_rate": "1e-4"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write a base and two fine-tunes as single files of one folder, as image programs keep them."""
    folder, generator = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(0)
    base = {f"model.diffusion_model.{i}.weight": torch.randn(48, 40, generator=generator) for i in range(3)}
    base["alphas"] = torch.randn(7, generator=generator)
    paths = [folder / f"{name}.safetensors" for name in ("base", "one", "two")]
    for place, path in enumerate(paths):
        noise = {n: torch.randn(t.shape, generator=generator) * 0.01 * place for n, t in base.items()}
        tensors = {n: (t + noise[n]).bfloat16() for n, t in base.items()}
        save_file(tensors, path, metadata={"format": "pt", **KEPT, **DROPPED} if not place else None)
    return paths


@pytest.fixture
def config(models: list[Path]) -> dict[str, Any]:
    return config_for("ties", models, parameters={"density": 0.5})


def test_its_tensors_are_those_of_a_directory_and_it_is_what_the_library_writes(
    config: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "mix.safetensors"
    (told,) = merge(config, tmp_path / "folder").warnings
    assert "no config.json" in told
    assert merge(config, out).warnings == ()
    assert sorted(path.name for path in out.parent.iterdir()) == ["mix.safetensors", "mix.safetensors.json"]
    merged = load_file(out)
    expected = load_file(tmp_path / "folder" / "model.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    save_file(merged, tmp_path / "again", metadata={"format": "pt"})
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", **KEPT}
    nbytes = sum(tensor.nbytes for tensor in merged.values())
    assert out.read_bytes()[-nbytes:] == (tmp_path / "again").read_bytes()[-nbytes:]


def test_one_without_metadata_is_byte_equal_to_what_the_library_writes(
    models: list[Path], tmp_path: Path
) -> None:
    merge(config_for("linear", models), tmp_path / "mix.safetensors", shard_size=1)
    save_file(load_file(tmp_path / "mix.safetensors"), tmp_path / "again", metadata={"format": "pt"})
    assert (tmp_path / "again").read_bytes() == (tmp_path / "mix.safetensors").read_bytes()


def test_it_is_known_again_verified_and_computed_again_under_a_new_name_too(
    config: dict[str, Any], tmp_path: Path
) -> None:
    out, moved = tmp_path / "mix.safetensors", tmp_path / "moved.safetensors"
    merge(config, out)
    for place in (out, moved):
        if place is moved:
            out.rename(moved)
            out.with_name("mix.safetensors.json").rename(moved.with_name("moved.safetensors.json"))
        assert merge(config, place).already_complete
        verdict = verify(place, against=config, sample=None)
        assert verdict.problems == ()
        assert verdict.files == 1
        assert verdict.recomputed is not None
        assert verdict.recomputed.problems == ()
    assert not moved.with_name("moved.safetensors.streammerge").exists()
    with pytest.raises(OutputError, match="holds a finished merge with a different seed"):
        merge(config, moved, seed=5)
    assert not merge(config, moved, seed=5, overwrite=True).already_complete
    assert verify(moved).problems == ()


def test_any_changed_bit_of_it_is_found(config: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "mix.safetensors"
    merge(config, out)
    size = out.stat().st_size
    for position in (3, 40, size // 2, size - 1):
        flip(out, position)
        (problem,) = verify(out).problems
        assert "mix.safetensors" in problem
        flip(out, position)
    os.truncate(out, size - 1)
    assert f"has {size - 1} bytes, {size} were written" in verify(out).problems[0]
    manifest = out.with_name("mix.safetensors.json")
    flip(manifest, 20)
    with pytest.raises(ModelError, match=r"mix.safetensors.json: is damaged"):
        verify(out)
    manifest.unlink()
    with pytest.raises(ModelError, match=r"no mix.safetensors.json next to it; not the output of a finished"):
        verify(out)
    out.unlink()
    with pytest.raises(ModelError, match=r"mix\.safetensors: no such file"):
        verify(out)


def test_an_unfinished_one_is_not_verified(config: dict[str, Any], tmp_path: Path) -> None:
    state = tmp_path / "mix.safetensors.streammerge"
    state.mkdir()
    (state / "journal.jsonl").touch()
    with pytest.raises(ModelError, match="the merge is not finished"):
        verify(tmp_path / "mix.safetensors")


def _an_input(out: Path, models: list[Path]) -> None:
    out.parent.rmdir()
    out.parent.symlink_to(models[0].parent)


# (what is done to OUT, its name, the message)
REFUSALS: list[tuple[str, Callable[[Path, list[Path]], object], str, str]] = [
    ("foreign", lambda out, models: out.write_bytes(b"mine"), "x.safetensors", "streammerge did not make it"),
    ("input", _an_input, "one.safetensors", "is a file of the input .*one.safetensors: choose a different"),
    ("link", lambda out, models: out.symlink_to(models[0]), "x.safetensors", "not a regular file"),
    ("pipe", lambda out, models: os.mkfifo(out), "x.safetensors", "not a regular file: choose"),
    (
        "someone's json",
        lambda out, models: Path(f"{out}.json").write_text("{}"),
        "x.safetensors",
        r"x.safetensors.json: exists, and streammerge did not make it: move it away",
    ),
    (
        "state is a file",
        lambda out, models: Path(f"{out}.streammerge").write_text(""),
        "x.safetensors",
        "exists, but must be a directory for the journal",
    ),
    (
        "state is a link",
        lambda out, models: Path(f"{out}.streammerge").symlink_to(models[0].parent),
        "x.safetensors",
        "exists, but must be a directory for the journal",
    ),
]


@pytest.mark.parametrize(("spoil", "name", "said"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_it_did_not_make_is_left_alone(
    spoil: Callable[[Path, list[Path]], object],
    name: str,
    said: str,
    overwrite: bool,
    models: list[Path],
    config: dict[str, Any],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    spoil(folder / name, models)
    before = {path.name: path.lstat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(OutputError, match=said) as caught:
        merge(config, folder / name, overwrite=overwrite)
    assert str(caught.value).isprintable()
    assert {path.name: path.lstat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_folder_of_that_name_is_a_folder(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").mkdir()
    merge(config, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors" / "model.safetensors").exists()


def test_what_would_lie_beside_the_weights_is_named_once(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models(n_models=2)
    (paths[0] / "tokenizer.json").write_text("{}")
    summary = merge(config_for("ties", paths), tmp_path / "x.safetensors")
    (note,) = summary.warnings
    assert note.endswith("is not written (config.json, tokenizer.json)")
    assert sorted(path.name for path in tmp_path.glob("x*")) == ["x.safetensors", "x.safetensors.json"]


def test_a_changed_tokenizer_or_folders_of_modules_need_a_directory(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models(n_models=2)
    for path in paths:
        (path / "tokenizer_config.json").write_text("{}")
    config = config_for("linear", paths, chat_template="chatml")
    with pytest.raises(InputError, match=r"changes the tokenizer .*, which a single file cannot hold"):
        merge(config, tmp_path / "x.safetensors")
    for path in paths:
        modules = [{"path": "", "type": "T"}, {"path": "2_Dense", "type": "D"}]
        (path / "modules.json").write_text(json.dumps(modules))
        (path / "2_Dense").mkdir()
        save_file({"w": torch.ones(2)}, path / "2_Dense" / "model.safetensors")
    with pytest.raises(InputError, match=r"lie in several folders \(2_Dense/ …\): name a directory as OUT"):
        merge(config_for("linear", paths), tmp_path / "x.safetensors")
    assert not list(tmp_path.glob("x*"))


def test_plan_shows_the_file_and_what_it_holds(
    config: dict[str, Any], models: list[Path], tmp_path: Path
) -> None:
    out, written = tmp_path / "mix.safetensors", tmp_path / "config.yml"
    written.write_text(json.dumps(config))
    shown = CliRunner().invoke(plan_command, [str(written), str(out)])
    assert "in 1 shard: mix.safetensors" in shown.output
    merge(config, out)
    shown = CliRunner().invoke(plan_command, [str(written), str(out), "--json"])
    assert json.loads(shown.output)["out_holds"] == "finished"
    assert plan(config, out=out).identity() == plan(config, out=tmp_path / "other.safetensors").identity()
