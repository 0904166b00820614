"""A merge that is not the one that was interrupted is refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from streammerge.errors import OutputError
from streammerge.formats.safetensors import read_header
from tests.conftest import output_bytes
from tests.laws.resume.scene import Scene, flip, flip_middle_of_a_tensor
from tests.laws.resume.traps import interrupt


def changed_parameter(scene: Scene) -> dict[str, Any]:
    other = {"normalize": False} if scene.config["merge_method"] == "fisher" else {"density": 0.5}
    return {"config": {**scene.config, "parameters": {**scene.config["parameters"], **other}}}


def changed_model_order(scene: Scene) -> dict[str, Any]:
    return {"config": {**scene.config, "models": scene.config["models"][::-1]}}


def changed_method(scene: Scene) -> dict[str, Any]:
    method = "dare_fisher" if scene.config["merge_method"] == "fisher" else "dare_ties"
    return {"config": {**scene.config, "merge_method": method, "parameters": {"density": 0.5}}}


def changed_seed(scene: Scene) -> dict[str, Any]:
    return {"seed": 4}


def changed_shard_size(scene: Scene) -> dict[str, Any]:
    return {"shard_size": 9_000}


def changed_input(scene: Scene) -> dict[str, Any]:
    flip_middle_of_a_tensor(scene.paths[1] / "model.safetensors")
    return {}


def changed_base_with_its_time_restored(scene: Scene) -> dict[str, Any]:
    path = scene.paths[0] / "model.safetensors"
    before = path.stat()
    flip_middle_of_a_tensor(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    return {}


def changed_where_no_fingerprint_looks(scene: Scene) -> dict[str, Any]:
    """A bit of the first element of a tensor, size and time as they were: only the system's own stamp tells."""
    path = scene.paths[1] / "model.safetensors"
    before = path.stat()
    flip(path, read_header(path)[0]["embed.weight"].offset)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return {}


def swapped_inputs(scene: Scene) -> dict[str, Any]:
    one, two = (path / "model.safetensors" for path in scene.paths[1:3])
    one.rename(one.with_name("x"))
    two.rename(one)
    one.with_name("x").rename(two)
    return {}


CHANGES: list[tuple[Callable[[Scene], dict[str, Any]], str]] = [
    (changed_parameter, "config"),
    (changed_model_order, "config"),
    (changed_method, "method"),
    (changed_seed, "seed"),
    (changed_shard_size, "shard size"),
    (changed_input, "m1"),
    (changed_base_with_its_time_restored, "base"),
    (changed_where_no_fingerprint_looks, "version of the files of .*m1"),
    (swapped_inputs, "m1"),
]


CASES = [
    pytest.param(finished, change, named, id=f"{'finished' if finished else 'unfinished'}-{change.__name__}")
    for finished in (False, True)
    for change, named in CHANGES
    # A finished merge knows the content of its inputs with --hash-inputs only: see test_known_again.py.
    if not (finished and change is changed_where_no_fingerprint_looks)
]


@pytest.mark.parametrize(("finished", "change", "named"), CASES)
def test_a_merge_that_changed_is_refused_by_name_and_overwrite_starts_over(
    finished: bool, change: Any, named: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    if finished:
        scene.merge(out)
    else:
        interrupt(scene, out, monkeypatch)
    options = change(scene)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(OutputError, match=rf"with a different .*{named}.*--overwrite") as caught:
        scene.merge(out, **options)
    assert caught.value.exit_code == 2
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert scene.merge(out, overwrite=True, **options).bytes_resumed == 0
    scene.merge(scene.directory / "fresh", **options)
    assert output_bytes(out) == output_bytes(scene.directory / "fresh")


def test_a_journal_of_another_version_is_refused_by_name(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    with monkeypatch.context() as patch:
        patch.setattr("streammerge.output.identity.__version__", "0.0.9")
        interrupt(scene, out, monkeypatch)
    with pytest.raises(OutputError, match=r"a different version.*--overwrite"):
        scene.merge(out)
    scene.merge(out, overwrite=True)
    scene.assert_finished(out)
