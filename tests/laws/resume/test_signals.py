"""Signals: stopped cleanly, or killed."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from streammerge.errors import Stopped
from streammerge.events import Event
from tests.laws.resume.scene import Scene
from tests.laws.resume.slow_merge import Slow, without_progress
from tests.patience import PATIENCE


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
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_it_in_one_line_and_it_goes_on(number: int, code: int, slow: Slow) -> None:
    process = slow.start_and_wait_for_work()
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    assert len(without_progress(err)) == 1
    assert "run the same command again" in err
    assert not (slow.out / "model.safetensors.index.json").exists()
    slow.finish()


@pytest.mark.slow
def test_a_signal_before_any_work_stops_it_without_a_traceback(slow: Slow) -> None:
    process = slow.start()
    time.sleep(0.25)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode in (143, -signal.SIGTERM)
    assert "Traceback" not in err
    slow.finish()
