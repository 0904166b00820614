"""Files that people edit are told of and are no damage; an unfinished commit is finished, its last name given anew."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.api import merge, verify
from streammerge.errors import OutputError, WorldError
from streammerge.output.place import STATE
from tests.conftest import write_model

EDITABLE = (
    "README.md",
    "LICENSE",
    "generation_config.json",
    "chat_template.jinja",
    "tokenizer_config.json",
    "SYSTEM_PROMPT.txt",
)
FIXED = ("config.json", "tokenizer.json", "spm.model", "streammerge_config.yml", "model.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A config and what it gives, with files of every kind beside the weights."""
    home = tmp_path_factory.mktemp("made")
    models = [write_model(home / name, {"w": torch.full((4, 4), float(i))}) for i, name in enumerate("ab")]
    for name in (*EDITABLE, *FIXED[1:3]):
        (models[0] / name).write_text('{"a": 1}')
    config = {
        "merge_method": "linear",
        "dtype": "float32",
        "models": [{"model": str(path), "parameters": {"weight": 0.5}} for path in models],
    }
    merge(config, home / "out")
    return config, home / "out"


@pytest.fixture
def out(made: tuple[dict[str, Any], Path], tmp_path: Path) -> Path:
    shutil.copytree(made[1], tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def config(made: tuple[dict[str, Any], Path]) -> dict[str, Any]:
    return made[0]


@pytest.mark.parametrize("name", EDITABLE)
@pytest.mark.parametrize("text", ['{"a": 2}', '{"b": "longer than it was"}'])
def test_an_edited_file_breaks_neither_verify_nor_a_second_run(
    name: str, text: str, config: dict[str, Any], out: Path
) -> None:
    (out / name).write_text(text)
    verdict, again = verify(out), merge(config, out)
    assert (verdict.problems, verdict.edits) == ((), {name: "edited since"})
    assert (again.already_complete, again.edits) == (True, {name: "edited since"})
    assert (out / name).read_text() == text


@pytest.mark.parametrize("name", EDITABLE)
def test_a_removed_file_is_told_and_not_fatal(name: str, config: dict[str, Any], out: Path) -> None:
    (out / name).unlink()
    assert (verify(out).problems, verify(out).edits) == ((), {name: "removed since"})
    assert merge(config, out).edits == {name: "removed since"}


@pytest.mark.parametrize("name", FIXED)
def test_what_the_model_is_made_of_may_not_be_edited(name: str, config: dict[str, Any], out: Path) -> None:
    raw = (out / name).read_bytes()
    (out / name).write_bytes(raw[:-1] + b"~")
    (problem,) = verify(out).problems
    assert problem.startswith(f"{name}: ")
    (out / name).write_bytes(raw + b"~")
    assert verify(out).problems
    with pytest.raises(OutputError, match=f"{name} is missing or has a different size"):
        merge(config, out)


def a_link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def no_text(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def no_json(path: Path) -> None:
    path.write_text("[" * 100_000)


@pytest.mark.parametrize("harm", [a_link, a_folder, a_pipe, no_text, zeros, no_json])
def test_what_no_editor_leaves_is_damage(harm: Callable[[Path], None], out: Path) -> None:
    harm(out / "generation_config.json")
    verdict = verify(out)
    assert verdict.edits == {}
    assert verdict.problems[0].startswith("generation_config.json: ")


def test_a_failed_sync_of_the_last_name_is_not_asked_again_but_the_name_is_given_anew(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", os.fsync

    def failing(descriptor: int) -> None:
        last = (out / "model.safetensors").exists() and os.readlink(f"/proc/self/fd/{descriptor}") == str(out)
        if last:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(WorldError, match="check the disk"):
            merge(config, out)
        with pytest.raises(WorldError, match="check the disk"):
            merge(config, out)
    assert (out / STATE).exists()
    calls: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(Path(b).name), replace(a, b))[1])
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("sync"), real(descriptor))[1])
    merge(config, out)
    assert "model.safetensors" in calls
    assert "sync" in calls[calls.index("model.safetensors") :]
    assert verify(out).problems == ()
    assert not (out / STATE).exists()


def test_an_edit_before_the_commit_was_over_is_not_believed(config: dict[str, Any], out: Path) -> None:
    expected = (out / "README.md").read_bytes()
    (out / STATE).mkdir()
    (out / "README.md").write_text("torn")
    assert not merge(config, out).already_complete
    assert (out / "README.md").read_bytes() == expected


@pytest.mark.parametrize("parts", [("file", "out"), ("file", "deep", "out")])
def test_an_out_that_cannot_be_made_is_told_so_and_nothing_is_called_kept(
    parts: tuple[str, ...], config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"file is not a directory: choose a different OUT") as caught:
        merge(config, tmp_path.joinpath(*parts))
    assert "kept" not in str(caught.value)


def test_an_out_that_is_a_file_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="exists and is not a directory: choose a different OUT"):
        merge(config, tmp_path / "file")


def test_a_folder_of_the_output_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    models = [write_model(tmp_path / name, {"w": torch.ones(4)}) for name in "ab"]
    (models[0] / "1_Pooling").mkdir()
    (models[0] / "1_Pooling" / "config.json").write_text(json.dumps({}))
    config = {
        "merge_method": "linear",
        "models": [{"model": str(m), "parameters": {"weight": 1}} for m in models],
    }
    out = tmp_path / "out"
    merge(config, out)
    shutil.rmtree(out / "1_Pooling")
    (tmp_path / "elsewhere").mkdir()
    (out / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WorldError, match=r"1_Pooling.*links are not followed"):
        merge(config, out, overwrite=True)
    assert list((tmp_path / "elsewhere").iterdir()) == []
