"""A merge into one file: killed at any moment, or power lost, it ends in the same bytes, and its folder stays clean."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from streammerge.errors import OutputError, WorldError
from streammerge.output.directory import locked
from streammerge.output.place import place_of
from tests.conftest import output_bytes
from tests.laws.resume.scene import Scene, make_scene
from tests.laws.resume.traps import Trap, set_trap
from tests.laws.resume.trials import Trials

OUT = Path("above") / "out.safetensors"
MANIFEST = "out.safetensors.json"


class OneFile(Scene):
    """A scene whose output is one file; `expected` has the bytes of everything that its folder holds then."""

    def __init__(self, scene: Scene) -> None:
        self.paths, self.config, self.options = scene.paths, scene.config, scene.options
        self.directory = scene.directory
        self.merge(self.directory / "expected file" / OUT.name)
        self.expected = output_bytes(self.directory / "expected file")

    def assert_finished(self, out: Path) -> None:
        """The file and its manifest are there, byte for byte, and nothing else."""
        assert output_bytes(out.parent) == self.expected

    def assert_nothing_torn(self, out: Path) -> None:
        """Until it is finished there is no file; a manifest may come before it."""
        if not out.parent.exists():
            return
        files = {path.name: path.read_bytes() for path in out.parent.iterdir() if path.is_file()}
        assert files in ({}, {MANIFEST: self.expected[MANIFEST]}, self.expected)


@pytest.fixture
def one_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OneFile:
    return OneFile(make_scene("dare", tmp_path, monkeypatch))


@pytest.fixture
def trials(one_file: OneFile) -> Trials:
    return Trials(one_file, random.Random(7), limit=40, n_random=1, out=OUT)


def test_killed_at_every_operation_it_ends_in_the_same_bytes(trials: Trials) -> None:
    whole = trials.disk("disk")
    trials.run(whole)
    n_ops = len(whole.log) - whole.begin
    assert n_ops > 30
    for at in (*range(8), *range(8, n_ops - 20, 7), *range(n_ops - 20, n_ops)):
        disk = trials.disk("disk")
        trials.run(disk, kill_at=disk.begin + at)
        trials.scene.assert_nothing_torn(disk.root / OUT)
        assert trials.run(disk)
        trials.scene.assert_finished(disk.root / OUT)


def test_power_lost_at_any_moment_leaves_nothing_torn(trials: Trials) -> None:
    disk = trials.disk("disk")
    assert trials.run(disk)
    trials.try_all(disk, disk.begin)
    assert trials.counts["states tried"] > 20


def test_power_lost_after_a_kill_in_the_commit(trials: Trials) -> None:
    plain = trials.disk("disk")
    trials.run(plain)
    n_ops = len(plain.log) - plain.begin
    trials.n_random, trials.limit = 0, 3
    for back in range(1, 9):
        disk = trials.disk("disk")
        if not trials.run(disk, kill_at=disk.begin + n_ops - back):
            begin = len(disk.log)
            assert trials.run(disk)
            trials.try_all(disk, begin)


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_killed_while_it_replaces_another_merge_it_is_the_old_or_the_new_one(
    finished: bool, one_file: OneFile
) -> None:
    old = {**one_file.config, "seed": 4}
    before = one_file.directory / "before" / OUT.name
    one_file.merge(before, config=old)
    trials = Trials(one_file, random.Random(7), limit=None, n_random=0, out=OUT)
    for at in range(0, 1000, 8):
        disk = trials.disk("disk")
        out = disk.root / OUT
        if finished:
            one_file.merge(out, config=old)
        else:
            trials.run(disk, kill_at=len(disk.log) + 30, config=old)
            assert (out.parent / "out.safetensors.streammerge").is_dir()
        disk = type(disk)(disk.root, pause=disk.pause)
        ended = trials.run(disk, kill_at=disk.begin + at, overwrite=True)
        if out.exists():
            assert out.read_bytes() in (before.read_bytes(), one_file.expected[OUT.name])
        if ended:
            break
        assert trials.run(disk, overwrite=True)
        one_file.assert_finished(out)
    assert at > 30


def test_finished_work_is_kept_and_another_merge_is_refused(
    one_file: OneFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = one_file.directory / "models"
    out = folder / OUT.name
    with monkeypatch.context() as patch:
        set_trap(patch, "ShardWriter.write", Trap(OSError(28, "full"), 4, once=False))
        with pytest.raises(WorldError, match="run the same command again"):
            one_file.merge(out)
    assert [path.name for path in folder.iterdir()] == ["out.safetensors.streammerge"]
    with pytest.raises(OutputError, match="unfinished merge with a different seed"):
        one_file.merge(out, seed=9)
    assert one_file.merge(out).bytes_resumed > 0
    one_file.assert_finished(out)


def test_merges_into_one_folder_do_not_wait_for_each_other(one_file: OneFile) -> None:
    folder = one_file.directory / "models"
    with locked(place_of(folder / "other.safetensors")):
        with pytest.raises(OutputError, match="a different merge is writing there"):
            one_file.merge(folder / "other.safetensors")
        one_file.merge(folder / OUT.name)
    one_file.assert_finished(folder / OUT.name)
