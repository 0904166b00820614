"""`streammerge sweep`: its table, its exit codes, its events, and the example of the page."""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from streammerge.api import sweep
from streammerge.demo import digits
from tests.cli.running import Cli, assert_refused, tree_of, write_config
from tests.cli.test_json_events import check, events_of

PAGE = (Path(__file__).parents[2] / "docs" / "use" / "sweeps.md").read_text()


@pytest.fixture
def grid(config: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config with a sweep of three points; nothing is made durable."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)
    text = yaml.safe_load(config.read_text())
    return write_config(config.with_name("grid.yml"), {**text, "sweep": {"lambda": [0.3, 0.5, 1.0]}})


def test_the_table_marks_the_best_and_a_failed_score_gives_exit_code_1(
    cli: Cli, grid: Path, tmp_path: Path
) -> None:
    command = "case {} in *0.3) exit 4;; *0.5) echo 0.25;; *) echo .125;; esac"
    run = cli("sweep", grid, tmp_path / "out", "--score", command, "--score-timeout", "60")
    assert run.code == 1
    head, *rows, last = run.out.splitlines()[-5:]
    assert head.split() == ["lambda", "score", "seconds", "reason"]
    assert rows[0].split()[0] == "0.3"
    assert rows[0].endswith("the command ended with exit code 4")
    assert [row.split()[:-1] for row in rows[1:]] == [["best", "0.5", "0.25"], ["1.0", "0.125"]]
    assert last == f"best: {tmp_path}/out/lambda=0.5"
    assert len(run.complaints) == 1
    assert "1 of 3 points have no score; lambda=0.3: the command ended with exit code 4" in run.complaints[0]
    before = tree_of(tmp_path / "out" / "lambda=0.5")
    assert cli("sweep", grid, tmp_path / "out", "--quiet").code == 0
    assert tree_of(tmp_path / "out" / "lambda=0.5") == before


def test_events_are_as_the_page_of_events_says(cli: Cli, grid: Path, tmp_path: Path) -> None:
    run = cli("sweep", grid, tmp_path / "out", "--score", ": {}; echo 1", "--keep", "best", "--json")
    assert run.code == 0
    *events, done = events_of(run.out)
    for event in events:
        check(event)
    kinds = [event["event"] for event in events if event["event"] not in ("progress", "warning")]
    assert kinds == ["start", *["scoring", "point"] * 3]
    assert events[0]["points"] == 3
    assert [event["fraction"] for event in events if event["event"] == "progress"][-1] == 1
    assert done["best"] == "lambda=0.3"
    assert [(one["values"], one["score"], one["removed"]) for one in done["points"]] == [
        ({"lambda": "0.3"}, 1.0, False),
        ({"lambda": "0.5"}, 1.0, True),
        ({"lambda": "1.0"}, 1.0, True),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep", "config.yml", "out"], "no key 'sweep'"),
        (
            ["sweep", "grid.yml", "out", "--keep", "worst"],
            "--keep 'worst': give all, best, or a whole number",
        ),
        (["sweep", "grid.yml", "out", "--disk", "3"], "--disk 3 is 3 bytes: did you mean 3GiB?"),
        (["sweep", "grid.yml", "out", "--disk", "1MB", "--memory", "20MB"], "is too little"),
        (
            ["merge", "grid.yml", "out"],
            "sweep: a sweep is several merges: run `streammerge sweep CONFIG OUT`",
        ),
        (["plan", "grid.yml"], "a sweep is several merges"),
    ],
)
def test_what_is_refused(
    arguments: list[str], words: str, cli: Cli, grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(grid.parent)
    assert_refused(cli(*arguments), words)
    assert not Path("out").exists()


def test_verify_names_the_config_of_the_point(cli: Cli, grid: Path, tmp_path: Path) -> None:
    sweep(grid, tmp_path / "out", on_event=lambda event: None)
    point = tmp_path / "out" / "lambda=0.3"
    assert_refused(
        cli("verify", point, "--against", grid), "verified against their own streammerge_config.yml"
    )
    assert cli("verify", point, "--against", point / "streammerge_config.yml").code == 0


def test_the_example_of_the_page_gives_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has the accuracy of each point as the page's script prints it, and the best one marked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    Path("demo").symlink_to(digits.model_dir("base").parent)
    (config,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    script = re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)[0]
    result = sweep(config, "swept", on_event=lambda event: None)
    told = {
        f"lambda={cells[0]},density={cells[1]}": cells[2]
        for cells in re.findall(r"^(?:best| {4})  (\d\S*) +(\d\S*) +(\d\S*)", PAGE, re.MULTILINE)
    }
    assert list(told) == list(result.points)
    found = {}
    names = list(told)
    for name in (names[0], names[5], names[-1]):  # the best one among them
        printed = io.StringIO()
        with redirect_stdout(printed):
            monkeypatch.setattr(sys, "argv", ["score.py", f"swept/{name}"])
            scope: dict[str, Any] = {}
            exec(script, scope)
        found[name] = float(printed.getvalue().split("\n")[-2])
    assert {name: f"{score:.6g}" for name, score in found.items()}.items() <= told.items()
    assert f"best: swept/{max(told, key=lambda name: float(told[name]))}" in PAGE
