"""One directory, one writer."""

from __future__ import annotations

import fcntl
import os
import signal
from typing import Any

import pytest

from streammerge.errors import OutputError
from streammerge.output.journal import Journal
from streammerge.output.place import JOURNAL as NAME
from streammerge.output.place import STATE
from streammerge.output.status import status_of
from streammerge.report.status import status_text, status_values
from tests.conftest import output_bytes
from tests.laws.resume.scene import Scene
from tests.laws.resume.slow_merge import Slow, without_progress
from tests.laws.resume.traps import interrupt
from tests.patience import PATIENCE


def test_a_directory_that_is_locked_is_refused(scene: Scene) -> None:
    out = scene.directory / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="a different merge is writing there"):
            scene.merge(out)
        assert list(out.iterdir()) == []
    finally:
        os.close(descriptor)
    scene.merge(out)
    scene.assert_finished(out)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_journal_that_another_machine_has_locked_is_refused_and_nothing_is_touched(
    overwrite: bool, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NFS a directory's lock holds on one machine, a file's on all."""
    out = scene.directory / "out"
    interrupt(scene, out, monkeypatch)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    descriptor = os.open(out / STATE / NAME, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(
            OutputError, match="a different merge is writing there, on this machine or a different one"
        ):
            scene.merge(out, overwrite=overwrite)
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    finally:
        os.close(descriptor)
    assert (scene.merge(out).bytes_resumed > 0) or overwrite
    scene.assert_finished(out)


def test_a_merge_whose_journal_another_machine_has_replaced_stops(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both began at the same moment, before there was a journal to lock."""
    out = scene.directory / "out"
    real = Journal.open

    def then_replaced(self: Journal, files: Any) -> None:
        real(self, files)
        copy = out / STATE / "other"
        copy.write_bytes((out / STATE / NAME).read_bytes())
        copy.replace(out / STATE / NAME)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "open", then_replaced)
        with pytest.raises(OutputError, match="a different merge has started there meanwhile"):
            scene.merge(out)
    scene.assert_nothing_torn(out)
    scene.merge(out)
    scene.assert_finished(out)


@pytest.mark.slow
def test_a_second_merge_is_refused_while_the_first_is_stopped_in_mid_work(slow: Slow) -> None:
    first = slow.start_and_wait_for_work()
    first.send_signal(signal.SIGSTOP)
    try:
        before = {p.name: p.stat().st_mtime_ns for p in slow.out.iterdir()}
        second = slow.start("--overwrite")
        out, err = second.communicate(timeout=PATIENCE)
        assert (second.returncode, out) == (2, "")
        assert len(without_progress(err)) == 1
        assert "a different merge is writing there" in err
        assert {p.name: p.stat().st_mtime_ns for p in slow.out.iterdir()} == before
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=PATIENCE) == 0
    assert output_bytes(slow.out) == slow.expected()


@pytest.mark.slow
def test_a_kill_is_told_at_once_and_leaves_no_lock_behind(slow: Slow) -> None:
    first = slow.start_and_wait_for_work()
    assert f"({first.pid}): works · read " in status_text(status_of(slow.out))
    first.kill()
    first.wait()
    told = status_of(slow.out)
    assert f"({first.pid}): has ended without finishing" in status_text(told)
    assert "nobody works on it: run the same command again to go on" in status_text(told)
    assert [worker["alive"] for worker in status_values(told)["workers"]] == [False]
    slow.finish()
