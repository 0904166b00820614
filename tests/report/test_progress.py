"""Progress while a merge runs: the bar by width, plain lines, estimates that do not flicker, a tidy end."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from streammerge.events import Event
from streammerge.report import progress
from streammerge.report.pace import Pace, Tracker
from streammerge.report.progress import BarReporter, LineReporter, make_reporter
from tests.laws.resume.slow_merge import Slow
from tests.patience import PATIENCE

GIB = 1 << 30
PLAN = {
    "models": ["m/math", "m/code"],
    "method": "ties",
    "base_model": "m/base",
    "out": "merged",
    "elements": 1000,
    "bytes_to_read": 5 * GIB,
    "bytes_to_write": 2 * GIB,
    "bytes_of_passes": 0,
    "memory": GIB // 2,
    "warnings": [],
}


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return what the reports take for the time."""
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def moved(elements: int, read: int, written: int = 0) -> Event:
    """Return the event of a merge so far."""
    values = {"elements": elements, "elements_total": 1000, "bytes_read": read, "bytes_written": written}
    return Event("progress", {**values, "tensors": 0, "tensors_total": 9})


# --- the bar


def frame(width: int) -> str:
    """Return the last line of the bar of a half finished merge on a terminal so wide."""
    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None, legacy_windows=False)
    reporter = BarReporter("merging", console=console)
    try:
        for event in (Event("plan", PLAN), Event("start", {"bytes_done": 0}), moved(0, 0)):
            reporter(event)
        time.sleep(0.11)  # the bar moves no more often than this
        reporter(moved(550, 3 * GIB, GIB))
        reporter._progress.refresh()
        return [line for line in re.split(r"[\r\n]", file.getvalue()) if "%" in line][-1]
    finally:
        reporter.close()


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_bar_has_twenty_cells_percent_and_time_left_at_every_width(width: int) -> None:
    line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame(width))
    assert len(line) <= width
    assert line.startswith("merging ")
    assert "55%" in line
    assert re.search(r"(\d|-):[-\d]{2}:[-\d]{2} left", line)
    cells = line.index(" 55%") - line.index("━")
    assert cells >= 20
    assert line.count("━") >= 0.4 * cells
    assert ("read 3.0 of 5.0 GiB" in line) == (width >= 100)
    assert ("memory" in line) == ("wrote 1.0 of 2.0 GiB" in line) == (width >= 140)


# --- estimates


def test_the_pace_is_that_of_the_last_half_minute() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.per_second is None
    for second in range(200):
        clock.now += 1
        pace.add(10 * second if second < 100 else 1000 + 50 * (second - 100))
    assert pace.per_second == pytest.approx(50)


def test_of_a_resumed_merge_the_time_left_counts_what_this_run_did() -> None:
    clock = Clock()
    tracker = Tracker(clock)
    tracker("plan", PLAN)
    tracker("resume", {"bytes_done": GIB})
    assert tracker.fraction == pytest.approx(0.5)
    for second in range(1, 11):
        clock.now += 1
        event = moved(500 + 10 * second, second * GIB // 20, second * GIB // 50)
        tracker("progress", event.values)
    assert tracker.fraction == pytest.approx(0.6)
    assert tracker.seconds_left == pytest.approx(40, rel=0.02)


def test_what_goes_before_the_start_counts_in_no_rate() -> None:
    clock = Clock()
    tracker = Tracker(clock)
    tracker("plan", PLAN)
    tracker("compiling", {"kernels": 3})
    clock.now += 60
    tracker("compiled", {})
    tracker("start", {"bytes_done": 0})
    clock.now += 2
    tracker("progress", moved(10, GIB).values)
    assert tracker.bytes_per_second == pytest.approx(GIB / 2)


def test_a_pass_over_the_whole_model_moves_the_bar_and_the_end_is_all() -> None:
    clock = Clock()
    tracker = Tracker(clock)
    tracker("plan", {**PLAN, "bytes_to_read": 8 * GIB, "bytes_of_passes": 4 * GIB})
    tracker("start", {"bytes_done": 0})
    seen = []
    for elements, read in ((0, 0), (0, 2 * GIB), (0, 4 * GIB), (500, 6 * GIB), (1000, 8 * GIB)):
        tracker("progress", moved(elements, read).values)
        seen.append(tracker.fraction)
    assert seen == pytest.approx([0, 0.2, 0.4, 0.7, 1.0])


# --- plain lines


def test_lines_begin_with_what_is_merged_and_tell_percent_rate_and_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter = LineReporter()
    reporter._tracker = Tracker(clock)
    for event in (Event("plan", PLAN), Event("start", {"bytes_done": 0})):
        reporter(event)
    for second in range(25):
        reporter(moved(8 * second, second * 50 << 20, second * 20 << 20))
        clock.now += 1
    said = capsys.readouterr()
    assert said.out == (
        "merging m/math, m/code by ties (base m/base) into merged: reads 5.0 GiB, writes 2.0 GiB\n"
    )
    first, second = said.err.splitlines()
    assert first == (
        "after 10.0 s: 8 %, read 500 MiB of 5.0 GiB, wrote 200 MiB of 2.0 GiB, 70.0 MiB/s, about 2 min left"
    )
    assert second.startswith("after 20.0 s: 16 %, ")


def test_a_dumb_terminal_and_a_pipe_get_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_reporter("merging"), LineReporter)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for term in ("dumb", "unknown", ""):
        monkeypatch.setenv("TERM", term)
        assert isinstance(make_reporter("merging"), LineReporter)
    monkeypatch.setenv("TERM", "xterm")
    reporter = make_reporter("merging")
    assert isinstance(reporter, BarReporter)
    reporter.close()
    assert isinstance(make_reporter("merging", quiet=True), LineReporter)


# --- stopped


def test_a_stop_is_told_at_once_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    received: list[int] = []
    reporter = LineReporter(signal_received=lambda: received[0] if received else None)
    reporter(moved(10, GIB))
    received.append(2)
    reporter(moved(20, GIB))
    reporter(moved(30, GIB))
    assert capsys.readouterr().out == "stopping after the running pieces…\n"


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_says_that_it_stops_and_leaves_no_bar_behind(
    make_models: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    slow = Slow(make_models(), tmp_path)
    master, slave = pty.openpty()
    process = slow.start(slow_from=15, stderr=slave)
    os.close(slave)
    seen = b""
    try:
        while not re.search(rb"[1-9]%", seen):
            seen += os.read(master, 4096)
        process.send_signal(signal.SIGINT)
        while True:
            seen += os.read(master, 4096)
    except OSError:
        pass  # the process has closed its end
    finally:
        os.close(master)
        out, _ = process.communicate(timeout=PATIENCE)
    text = seen.decode()
    assert process.returncode == 130, text
    assert out == ""
    after = text[text.index("stopping after the running pieces…") :]
    assert "% done)" in after
    last = after[after.rindex("\x1b[2K") :]
    assert "━" not in last
    assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).strip() == (
        "streammerge: stopped; run the same command again to continue"
    )
