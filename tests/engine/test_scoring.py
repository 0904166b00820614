"""The command that scores an output: what it prints, how it fails, and how it is ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from streammerge.engine.scoring import check_command, filled, score
from streammerge.errors import InputError, Stopped
from streammerge.events import Control
from tests.patience import PATIENCE


@pytest.mark.parametrize(
    ("command", "value"),
    [
        ("echo loading; echo 0.25", 0.25),
        ("printf '1e-3'", 0.001),
        ("printf -- '-3\\n\\n  \\n'", -3.0),
        ("echo 7 | sed s/7/8/ # {}", 8.0),
        ("head -c 300000 /dev/zero; echo; echo 5", 5.0),
        ("printf '\\377\\376\\n.5\\n'", 0.5),
        ("read line; echo 1", 1.0),  # its standard input is empty
    ],
)
def test_the_last_line_is_the_score(command: str, value: float, tmp_path: Path) -> None:
    found = score(command, tmp_path, 20, Control())
    assert (found.value, found.reason) == (value, "")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo best model", "the last line is not a number: 'best model'"),
        ("echo 0.5; echo done", "the last line is not a number: 'done'"),
        ("echo 1_000", "not a number"),
        ("echo nan", "the last line, 'nan', is not a finite number"),
        ("echo -inf", "is not a finite number"),
        ("echo 1e999", "is not a number"),
        ("printf '\\033[2J'", "x1b[2J"),
        ("true", "the command printed nothing"),
        ("echo 1; echo 'no such file' >&2; exit 3", "the command ended with exit code 3: no such file"),
        ("echo 1; kill -9 $$", "the command was killed by SIGKILL"),
        ("no-such-command-anywhere {}", "the command ended with exit code 127"),
    ],
)
def test_a_command_that_fails_gives_a_reason_in_one_line(command: str, reason: str, tmp_path: Path) -> None:
    found = score(command, tmp_path, 20, Control())
    assert found.value is None
    assert reason in found.reason
    assert found.reason.isprintable()


def test_a_command_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    command = "(sleep 60; touch {}/slept) & echo $! > {}/child; echo 1; wait"
    for limit in (0.3, 3, 30):
        found = score(command, tmp_path, limit, Control())
        assert (found.value, found.reason) == (None, f"the command took longer than {limit} s")
        if (tmp_path / "child").exists():  # a slow machine starts no command in the shortest time
            break
    assert not _runs(int((tmp_path / "child").read_text()))
    assert not (tmp_path / "slept").exists()


def test_what_a_command_leaves_running_is_ended(tmp_path: Path) -> None:
    found = score("sleep 60 & echo $! > {}/child; echo 4", tmp_path, None, Control())
    assert found.value == 4
    assert not _runs(int((tmp_path / "child").read_text()))


def test_a_stop_ends_the_command(tmp_path: Path) -> None:
    stop = threading.Event()
    threading.Thread(target=lambda: _wait_for(tmp_path / "own") or stop.set()).start()
    with pytest.raises(Stopped) as caught:
        score("echo $$ > {}/own; sleep 60", tmp_path, None, Control(stop=stop, signal=lambda: signal.SIGINT))
    assert caught.value.exit_code == 130
    assert not _runs(int((tmp_path / "own").read_text()))


def _wait_for(path: Path) -> None:
    """Return when a file has content."""
    until = time.monotonic() + PATIENCE
    while not (path.exists() and path.read_text()) and time.monotonic() < until:
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    """Return whether a process still runs after a while; one that nobody has waited for yet does not."""
    for _ in range(3000):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except (ProcessLookupError, FileNotFoundError):
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("name", ["plain", "a b", "it's", 'say "x"', "$HOME `id` \\"])
@pytest.mark.parametrize("command", ["printf %s {}", 'printf %s "{}"', "printf %s '{}'", 'printf %s "\'"{}'])
def test_any_directory_is_one_word_however_it_is_quoted(name: str, command: str) -> None:
    expected = f"'{name}" if "'\"{}" in command else name
    assert subprocess.check_output(["/bin/sh", "-c", filled(command, name)], text=True) == expected


def test_a_command_must_say_where_the_directory_goes() -> None:
    with pytest.raises(
        InputError, match=re.escape("write {} where it goes, as in --score 'python score.py {}'")
    ):
        check_command("python score.py")
