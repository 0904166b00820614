"""Power lost at any moment: nothing torn, and run again, the same bytes as if nothing had happened.

`tools/prove/power_loss.py` tries every state where these tests draw some.
"""

from __future__ import annotations

import json
import random

import pytest

from streammerge.output.place import JOURNAL as NAME
from streammerge.output.place import STATE
from tests.laws.resume.file_log import Link, Sync, Write
from tests.laws.resume.power_loss import blackouts, build, pending
from tests.laws.resume.scene import Scene, make_scene
from tests.laws.resume.trials import OUT, Trials


@pytest.fixture
def trials(scene: Scene) -> Trials:
    return Trials(scene, random.Random(7), limit=50, n_random=2)


def test_power_lost_in_a_merge(trials: Trials) -> None:
    disk = trials.disk("disk")
    assert trials.run(disk)
    trials.try_all(disk, disk.begin)
    assert trials.counts["states tried"] > 40


def test_power_lost_in_a_merge_that_was_killed_twice_before(trials: Trials) -> None:
    """The killed runs' writes are in the page cache, believed by the next run, and perhaps not on the disk."""
    plain = trials.disk("disk")
    trials.run(plain)
    n_ops = len(plain.log) - plain.begin
    trials.limit = 20
    for number in range(2):
        disk = trials.disk(f"disk{number}")
        trials.killed_at_random(disk, n_ops)
        begin = trials.killed_at_random(disk, n_ops)
        assert trials.run(disk)
        trials.try_all(disk, begin)


def test_power_lost_in_a_merge_that_resumes_after_power_was_lost(trials: Trials) -> None:
    plain = trials.disk("disk")
    trials.run(plain)
    trials.limit = 12
    for number, loss in enumerate(trials.chance.sample(trials.losses(plain, plain.begin), 3)):
        disk = trials.disk(f"disk{number}", loss.tree(plain.log))
        assert trials.run(disk)
        trials.try_all(disk, disk.begin)


def test_after_a_sync_that_failed_the_page_cache_is_not_believed(trials: Trials) -> None:
    """Every sync fails once; the next run in the same boot ends well, and what it wrote survives."""
    trials.limit = 3
    for number in range(1000):
        disk = trials.disk(f"disk{number}")
        disk.fail_sync = number
        if trials.run(disk):
            break
        begin = len(disk.log)
        (place,) = (place for place, op in enumerate(disk.log) if isinstance(op, Sync) and not op.good)
        assert Sync(disk.log[place].target) not in disk.log[place:], "asked again"
        assert trials.run(disk)
        trials.try_all(disk, begin)
        trials.try_one(build(disk.log, set(pending(disk.log)), {}), ended=True)
    assert number > 8


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_power_lost_while_another_merge_is_replaced(
    finished: bool, trials: Trials, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = "dare" if "ties" in trials.scene.config.values() else "ties"
    old = make_scene(case, trials.scene.directory / "old", monkeypatch)
    disk = trials.replacing(old, finished=finished)
    cleared = (
        next(
            place
            for place, op in enumerate(disk.log)
            if place >= disk.begin and isinstance(op, Link) and op.name.startswith(NAME)
        )
        + 6
    )
    trials.n_random, trials.limit = 0, 60
    trials.try_replaced(disk, old, cleared)
    trials.limit = 12
    trials.try_replaced(disk, old)


def test_power_lost_in_the_run_after_a_kill_at_the_very_end(trials: Trials) -> None:
    """The names were given but not synced by a run that was killed; the next one finds all done."""
    plain = trials.disk("disk")
    trials.run(plain)
    n_ops = len(plain.log) - plain.begin
    trials.n_random, trials.limit = 0, 8
    for back in range(1, 8):
        disk = trials.disk("disk")
        if not trials.run(disk, kill_at=disk.begin + n_ops - back):
            begin = len(disk.log)
            assert trials.run(disk)
            trials.try_all(disk, begin)


def test_work_that_was_recorded_is_not_done_again_after_power_was_lost(trials: Trials) -> None:
    disk = trials.disk("disk")
    trials.run(disk)
    journal = str(OUT / STATE / NAME)
    resumed = set()
    for cut in range(disk.begin, len(disk.log)):
        log = disk.log[:cut]
        if not isinstance(log[-1], Sync):
            continue
        tree = build(log, set(pending(log)), {})
        lines = [json.loads(line[9:]) for line in (tree.get(journal) or b"").splitlines()]
        elements = sum(line["done"][2] - line["done"][1] for line in lines if "done" in line)
        if elements and elements not in resumed:
            resumed.add(elements)
            disk_after = trials.disk("after", tree)
            summary = trials.scene.merge(disk_after.root / OUT)
            integers = 16 * 8 if summary.bytes_resumed % (2 * elements) else 0
            assert summary.bytes_resumed >= 2 * elements - integers
    assert len(resumed) >= 2


def test_the_model_of_a_disk_forgets_what_was_not_synced() -> None:
    """A file of two writes of which one is synced, renamed, the directory not synced."""
    log = [Link(0, "f", 1), Write(1, 0, b"ab"), Sync(1), Write(1, 2, b"cd")]
    chance = random.Random(0)
    trees = [loss.tree(log) for loss in blackouts(log, len(log), chance, 20)]
    contents = {tree.get("f") for tree in trees}
    assert {None, b"ab", b"abcd", b"abc", b"ab\0\0"} <= contents
    assert not any(data is not None and not data.startswith(b"ab") for data in contents)
