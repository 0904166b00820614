"""Signals: stopped cleanly, or killed."""

from __future__ import annotations

import random
import shutil
import signal
import threading
import time

import pytest

from streammerge.engine.journal import STATE
from streammerge.engine.session import Event
from streammerge.errors import Stopped
from tests.resume.scene import Scene
from tests.resume.slow_merge import Slow


def test_a_stop_that_was_asked_for_is_clean_and_resumable(scene: Scene) -> None:
    out = scene.directory / "out"
    stop = threading.Event()

    def on_event(event: Event) -> None:
        if event.kind == "progress" and event.values["elements"]:
            stop.set()

    with pytest.raises(Stopped) as caught:
        scene.merge(out, stop=stop, on_event=on_event, signal_received=lambda: signal.SIGTERM)
    assert caught.value.exit_code == 143
    scene.assert_nothing_torn(out)
    scene.merge(out)
    scene.assert_finished(out)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_bytes(slow: Slow) -> None:
    chance = random.Random(20)
    expected = slow.expected()
    killed = 0
    while killed < 8:
        # The first runs die early, the later ones near the end and in the commit, or they end by themselves.
        code = slow.start(kill_at=chance.randint(1, 20)).wait(timeout=60)
        assert code in (0, -signal.SIGKILL)
        killed += code == -signal.SIGKILL
        names = {p.name for p in slow.out.iterdir()}
        if "model.safetensors.index.json" in names:
            assert {p.name: p.read_bytes() for p in slow.out.iterdir() if p.is_file()} == expected
        assert all(
            (slow.out / name).read_bytes() == expected[name]
            for name in names - {STATE}
            if not name.endswith(".partial")
        )
        if code == 0:
            shutil.rmtree(slow.out)
    slow.finish()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_in_one_line_and_it_goes_on(number: int, code: int, slow: Slow) -> None:
    process = slow.start_and_wait_for_work()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code, err
    assert len(err.splitlines()) == 1
    assert "run the same command again" in err
    assert not (slow.out / "model.safetensors.index.json").exists()
    slow.finish()


@pytest.mark.slow
def test_a_signal_before_any_work_stops_it_without_a_traceback(slow: Slow) -> None:
    process = slow.start()
    time.sleep(0.25)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (143, -signal.SIGTERM)
    assert "Traceback" not in err
    slow.finish()
