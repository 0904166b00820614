"""Damage to an unfinished directory is done again or refused, never believed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from streammerge.api import plan
from streammerge.dtypes import itemsize
from streammerge.errors import OutputError, StreammergeError
from streammerge.output.check import verify
from streammerge.output.journal import _load
from streammerge.output.place import JOURNAL as NAME
from streammerge.output.place import STATE
from tests.laws.resume.scene import Scene, SimulatedKill, flip
from tests.laws.resume.traps import Trap, interrupt, set_trap


def torn_tail(out: Path) -> None:
    path = out / STATE / NAME
    os.truncate(path, path.stat().st_size - 7)


def half_a_journal(out: Path) -> None:
    path = out / STATE / NAME
    os.truncate(path, path.stat().st_size // 2)


def rubbish_after_the_journal(out: Path) -> None:
    with (out / STATE / NAME).open("ab") as file:
        file.write(b"\x00\xff{]\n" + b"0" * 5000)


def empty_journal(out: Path) -> None:
    os.truncate(out / STATE / NAME, 0)


def zeroed_journal(out: Path) -> None:
    path = out / STATE / NAME
    path.write_bytes(bytes(path.stat().st_size))


def deleted_journal(out: Path) -> None:
    (out / STATE / NAME).unlink()


def partials(out: Path) -> list[Path]:
    return sorted(out.glob("model*.partial"))


def damaged_shard(out: Path) -> None:
    for path in partials(out):
        size = path.stat().st_size
        for position in range(size // 100, size, size // 20):
            flip(path, position, 3)


def damaged_shard_header(out: Path) -> None:
    for path in partials(out):
        flip(path, 20)


def zeroed_shard(out: Path) -> None:
    for path in partials(out):
        path.write_bytes(bytes(path.stat().st_size))


def truncated_shard(out: Path) -> None:
    for path in partials(out):
        os.truncate(path, path.stat().st_size // 2)


def longer_shard(out: Path) -> None:
    for path in partials(out):
        os.truncate(path, path.stat().st_size + 1)


def deleted_shard(out: Path) -> None:
    for path in partials(out):
        path.unlink()


DAMAGES = [
    torn_tail,
    half_a_journal,
    rubbish_after_the_journal,
    empty_journal,
    zeroed_journal,
    deleted_journal,
    damaged_shard,
    damaged_shard_header,
    zeroed_shard,
    truncated_shard,
    longer_shard,
    deleted_shard,
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("when", ["in the merge", "in the commit"])
def test_damage_to_an_unfinished_directory_is_done_again(
    when: str, damage: Callable[[Path], None], scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    if when == "in the merge":
        interrupt(scene, out, monkeypatch, after=6)
    else:
        with monkeypatch.context() as patch:
            set_trap(patch, "ShardWriter.publish", Trap(SimulatedKill(), 1, once=True))
            with pytest.raises(SimulatedKill):
                scene.merge(out)
    damage(out)
    scene.merge(out)
    scene.assert_finished(out)
    assert verify(out).problems == ()


def a_bit(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0" * 100)


def zeroes(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def in_the_merge(scene: Scene, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    interrupt(scene, out, monkeypatch, after=6)
    return [out / STATE / NAME]


def in_a_small_file_of_the_commit(scene: Scene, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The sign of life, the journal twice, every shard, then small files: the first of these stays unnamed."""
    shards = sum(name.endswith(".safetensors") for name in scene.expected)
    with monkeypatch.context() as patch:
        set_trap(patch, "os.replace", Trap(SimulatedKill(), 4 + shards, once=True))
        with pytest.raises(SimulatedKill):
            scene.merge(out)
    left = sorted(out.glob("*.partial"))
    assert [path for path in left if not path.name.startswith("model")]
    assert partials(out)
    return left


def behind_the_last_name(scene: Scene, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file has its name, and nothing but the journal is left to remove."""
    with monkeypatch.context() as patch:
        set_trap(patch, "Journal.remove", Trap(SimulatedKill(), 1, once=True))
        with pytest.raises(SimulatedKill):
            scene.merge(out)
    return [out / name for name in scene.expected]


def behind_the_shards(scene: Scene, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """All shards of several have their names, the index has not."""
    with monkeypatch.context() as patch:
        set_trap(patch, "write_file", Trap(SimulatedKill(), 6 if len(scene.expected) > 6 else 5, once=False))
        with pytest.raises(SimulatedKill):
            scene.merge(out)
    assert bool(partials(out)) == (len(scene.expected) == 6)
    return sorted(out.glob("model*.safetensors")) or partials(out)


@pytest.mark.parametrize("scene", ["ties", "dare"], indirect=True, ids=["shards", "one file"])
@pytest.mark.parametrize("harm", [a_bit, cut, longer, zeroes, Path.unlink])
@pytest.mark.parametrize(
    "moment", [in_the_merge, in_a_small_file_of_the_commit, behind_the_shards, behind_the_last_name]
)
def test_no_harm_to_journal_temporary_files_or_finished_shards_is_believed(
    moment: Callable[..., list[Path]],
    harm: Callable[[Path], None],
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = scene.directory / "out"
    for path in moment(scene, out, monkeypatch):
        harm(path)
    scene.merge(out)
    scene.assert_finished(out)


@pytest.mark.parametrize("scene", ["ties", "dare"], indirect=True, ids=["shards", "one file"])
def test_each_file_of_a_commit_alone_is_made_again_when_it_is_harmed_behind_its_end(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, out = scene.directory / "saved", scene.directory / "out"
    for path in behind_the_last_name(scene, saved, monkeypatch):
        shutil.copytree(saved, out)
        a_bit(out / path.name)
        scene.merge(out)
        scene.assert_finished(out)
        shutil.rmtree(out)


@pytest.mark.parametrize("scene", ["ties", "dare"], indirect=True, ids=["shards", "one file"])
def test_only_what_no_longer_matches_its_receipt_is_done_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, out = scene.directory / "saved", scene.directory / "out"
    interrupt(scene, saved, monkeypatch, after=7)
    progress, _ = _load(saved / STATE / NAME)
    assert progress is not None
    shutil.copytree(saved, out)
    whole = scene.merge(out).bytes_resumed
    jobs = plan(scene.config, **scene.options)
    for receipt in progress.receipts:
        shutil.rmtree(out)
        shutil.copytree(saved, out)
        (slot,), width = jobs.layout.slots[receipt.job], itemsize(jobs.jobs[receipt.job].dtype)
        flip(partials(out)[slot.shard], slot.offset + receipt.stop * width - 1)
        assert scene.merge(out).bytes_resumed == whole - (receipt.stop - receipt.start) * width
        scene.assert_finished(out)


def test_a_flipped_bit_anywhere_in_the_journal_is_never_believed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, out = scene.directory / "saved", scene.directory / "out"
    interrupt(scene, saved, monkeypatch, after=6)
    size = (saved / STATE / NAME).stat().st_size
    for position in [*range(12), *range(12, size, size // 25), size - 1]:
        shutil.copytree(saved, out)
        flip(out / STATE / NAME, position, position % 8)
        scene.merge(out)
        scene.assert_finished(out)
        shutil.rmtree(out)


def test_partial_shards_without_any_journal_are_refused(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch)
    shutil.rmtree(out / STATE)
    with pytest.raises(OutputError, match="did not write"):
        scene.merge(out)


@pytest.mark.parametrize("name", [NAME, "model.safetensors.partial"])
def test_a_link_planted_in_the_output_is_not_followed(
    name: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, victim = scene.directory / "out", scene.directory / "victim"
    interrupt(scene, out, monkeypatch)
    victim.write_bytes(b"precious")
    place = out / STATE / NAME if name == NAME else out / name
    place.unlink(missing_ok=True)
    place.symlink_to(victim)
    with contextlib.suppress(StreammergeError):
        scene.merge(out)
    assert victim.read_bytes() == b"precious"


@pytest.mark.parametrize("moment", ["Journal.remove", "os.rmdir"])
def test_what_loads_goes_first_when_a_finished_commit_is_found_damaged(
    moment: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All was there but the end of the commit; then a file was lost, and the run that makes it again is killed."""
    saved, out = scene.directory / "saved", scene.directory / "out"
    with monkeypatch.context() as patch:
        set_trap(patch, moment, Trap(SimulatedKill(), 1, once=True))
        with pytest.raises(SimulatedKill):
            scene.merge(saved)
    (saved / "config.json").unlink()
    for at in range(1, 100):
        shutil.copytree(saved, out)
        with monkeypatch.context() as patch:
            trap = Trap(SimulatedKill(), at, once=False)
            set_trap(patch, "os.pwrite", trap)
            with contextlib.suppress(SimulatedKill):
                scene.merge(out)
        if not trap.sprung:
            break
        scene.assert_nothing_torn(out)
        scene.merge(out)
        scene.assert_finished(out)
        shutil.rmtree(out)
    assert 1 < at < 99


def test_a_link_in_place_of_the_state_is_refused(scene: Scene) -> None:
    out, elsewhere = scene.directory / "out", scene.directory / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / STATE).symlink_to(elsewhere)
    with pytest.raises(OutputError, match="is a link, which streammerge did not make"):
        scene.merge(out)
    assert not list(elsewhere.iterdir())
