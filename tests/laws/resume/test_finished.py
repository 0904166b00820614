"""A finished merge run again, and started over."""

from __future__ import annotations

from pathlib import Path

import pytest

from streammerge.errors import OutputError
from tests.conftest import output_bytes
from tests.laws.resume.scene import Scene, SimulatedKill
from tests.laws.resume.traps import Trap, set_trap


def test_a_finished_merge_run_again_reads_and_writes_nothing(scene: Scene) -> None:
    out = scene.directory / "expected"
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ctime_ns, p.stat().st_ino) for p in out.iterdir()}
    directory = out.stat().st_mtime_ns
    summary = scene.merge(out)
    assert summary.already_complete
    assert (summary.bytes_read, summary.bytes_written) == (0, 0)
    after = {p.name: (p.stat().st_mtime_ns, p.stat().st_ctime_ns, p.stat().st_ino) for p in out.iterdir()}
    assert after == before
    assert out.stat().st_mtime_ns == directory


def test_a_finished_merge_that_lost_a_file_is_refused_and_started_over_on_request(scene: Scene) -> None:
    out = scene.directory / "expected"
    (out / "config.json").unlink()
    with pytest.raises(OutputError, match=r"missing or has a different size.*--overwrite"):
        scene.merge(out)
    scene.merge(out, overwrite=True)
    scene.assert_finished(out)


def test_overwrite_starts_over_after_an_interruption_in_the_commit(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        set_trap(patch, "ShardWriter.publish", Trap(SimulatedKill(), 1, once=True))
        with pytest.raises(SimulatedKill):
            scene.merge(out)
    scene.merge(out, overwrite=True)
    assert output_bytes(out) == scene.expected


def test_overwrite_leaves_files_of_others_alone(scene: Scene, tmp_path: Path) -> None:
    out = tmp_path / "out"
    scene.merge(out)
    (out / "notes.txt").write_text("mine")
    scene.merge(out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert output_bytes(out) == scene.expected


def test_starting_over_removes_no_file_that_only_looks_like_ours(scene: Scene, tmp_path: Path) -> None:
    out = tmp_path / "out"
    scene.merge(out)
    names = ["model-old.safetensors", "model.safetensors.bak", "download.partial", "model-1-of-2.safetensors"]
    for name in names:
        (out / name).write_text("mine")
    scene.merge(out, overwrite=True)
    for name in names:
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    scene.assert_finished(out)
