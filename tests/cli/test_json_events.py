"""`--json`: what docs/use/json.md says is printed is what is printed, errors and stops too."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streammerge.events import Event
from streammerge.report.progress import JsonReporter
from tests.cli.running import Cli, write_config
from tests.conftest import config_for, write_fisher

PAGE = (Path(__file__).parents[2] / "docs" / "use" / "json.md").read_text()
ALWAYS = {"event", "seconds"}


def documented() -> dict[str, dict[str, str]]:
    """Return the fields of every event of the page, each with its type and meaning."""
    sections = re.split(
        r"^### `(\w+)`$", PAGE.partition("\n## Events")[2].partition("\n## `plan")[0], flags=re.M
    )
    found = {}
    for name, text in zip(sections[1::2], sections[2::2], strict=True):
        found[name] = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, flags=re.M))
    found["resume"] = found["start"]
    return found


def check(event: dict[str, Any]) -> None:
    """Compare an event with the page: the same fields, but for those that only some have."""
    fields = documented()[event["event"]]
    optional = {name for name, meaning in fields.items() if " only" in meaning}
    told = set(event) - ALWAYS
    assert set(event) >= ALWAYS
    assert told <= set(fields), event
    assert set(fields) - optional <= told, event
    for name, meaning in fields.items():
        if event.get(name, 0) is None:
            assert "null" in meaning.partition("|")[0], name


def events_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def paths(make_models: Callable[..., list[Path]]) -> list[Path]:
    return make_models(2, shapes={"layers.0.weight": (64, 40), "norm": (40,)})


def test_every_event_is_as_the_page_says_and_the_page_names_no_other(
    cli: Cli, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    parameters = {"density": 0.5, "int8_mask": True}
    config = write_config(tmp_path / "c.yml", config_for("ties", paths, parameters=parameters))
    fisher = write_config(tmp_path / "f.yml", config_for("fisher", paths))
    seen: list[dict[str, Any]] = []

    def run(*arguments: object) -> list[dict[str, Any]]:
        events = events_of(cli(*arguments, "--json").out)
        seen.extend(events)
        return events

    first = run("merge", config, tmp_path / "out", "--hash-inputs")
    assert [event["event"] for event in first[-2:]] == ["commit", "done"]
    assert first[-1]["elements"] == 64 * 40 + 40
    assert [event["seconds"] for event in first] == sorted(event["seconds"] for event in first)
    last = [event for event in first if event["event"] == "progress"][-1]
    assert last["fraction"] == 1
    assert run("merge", config, tmp_path / "out")[-1]["already_complete"] is True
    assert "floored" in run("merge", fisher, tmp_path / "fisher")[-1]
    run("merge", config, tmp_path / "out", "--seed", "9")
    imported = run("fisher", "import", paths[1], write_fisher(paths[1]), "--out", tmp_path / "s.zarr")
    assert imported.pop()["event"] == "done"  # its fields are the store's own
    seen.pop()

    # Events that a test cannot wait for go through the reporter itself.
    received: list[int] = []
    reporter = JsonReporter(lambda: received[0] if received else None)
    capsys.readouterr()
    reporter(Event("compiling", {"kernels": 1, "names": ["sums"]}))
    reporter(Event("compiled", {"kernels": 1, "seconds": 1.5}))
    for event in first:
        if event["event"] == "start":
            plan = {key: event[key] for key in event if key not in ALWAYS | {"bytes_done"}}
            reporter(Event("plan", {**plan, "warnings": []}))
    reporter(Event("hash", {"bytes_read": 5}))
    JsonReporter()(Event("report", {"bytes_read": 5}))
    JsonReporter()(Event("gates", {"layer": 0, "layers": 2, "bytes_read": 5}))
    JsonReporter()(Event("scoring", {"point": "lambda=0.3"}))
    JsonReporter()(Event("point", {"point": "lambda=0.3", "score": None, "seconds": None, "reason": "x"}))
    reporter(Event("resume", {"bytes_done": 100}))
    received.append(signal.SIGINT)
    reporter.close()
    seen += events_of(capsys.readouterr().out)

    for event in seen:
        check(event)
    assert {event["event"] for event in seen} == set(documented())


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["merge", "none.yml", "out"], "config"),
        (["merge", "--memroy=1", "a", "b"], "usage"),
        (["merge", "c.yml", "out", "--memory", "0"], "input"),
        (["merge", "c.yml", "file"], "output"),
        (["merge", "c.yml", "out", "--memory", "5MiB"], "budget"),
        (["merge", "m.yml", "out"], "model"),
        (["fisher", "import", "nowhere", "x", "--out", "s"], "model"),
    ],
)
def test_an_error_is_an_event_beside_the_line(
    arguments: list[str],
    kind: str,
    cli: Cli,
    paths: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_for("linear", paths)
    write_config(tmp_path / "c.yml", config)
    write_config(tmp_path / "m.yml", {**config, "models": [{"model": "nowhere/at-all"}]})
    (tmp_path / "file").write_text("mine")
    run = cli(*arguments, "--json")
    (event,) = [event for event in events_of(run.out) if event["event"] == "error"]
    check(event)
    assert (run.code, event["exit_code"], event["kind"]) == (2, 2, kind)
    assert run.complaints == [f"streammerge: {event['message']}"]


def test_plan_prints_no_event_for_an_error(cli: Cli) -> None:
    run = cli("plan", "none.yml", "--json")
    assert (run.code, run.out) == (2, "")
