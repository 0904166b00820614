"""The command line: exit codes, one line per refusal, machine-readable output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import streammerge.cli
from tests.cli.running import FEW, Cli, assert_refused, tree_of, write_config
from tests.conftest import config_for, write_model

COMMANDS = ["merge", "plan", "verify", "inspect", "methods", "demo"]


def test_the_main_command_lists_every_command(cli: Cli) -> None:
    run = cli("--help")
    assert run.code == 0
    assert run.err == ""
    assert all(f"  {command} " in run.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help(command: str, flag: str, cli: Cli) -> None:
    run = cli(command, flag)
    assert run.code == 0
    assert run.out.startswith(f"Usage: streammerge {command}") or run.out.startswith("Usage:")
    assert len(run.out.splitlines()) > 4


def test_the_version_is_printed(cli: Cli) -> None:
    assert streammerge.__version__ in cli("--version").out


def test_a_merge_exits_0_and_says_what_it_wrote(cli: Cli, config: Path, tmp_path: Path) -> None:
    run = cli("merge", config, tmp_path / "out")
    assert run.code == 0
    assert run.complaints == []
    assert "4 tensors in 1 shard" in run.out


def test_a_finished_merge_run_again_exits_0_and_does_nothing(cli: Cli, config: Path, tmp_path: Path) -> None:
    cli("merge", config, tmp_path / "out")
    run = cli("merge", config, tmp_path / "out")
    assert run.code == 0
    assert "nothing was done" in run.out


def test_quiet_prints_nothing_on_success(cli: Cli, config: Path, tmp_path: Path) -> None:
    assert cli("merge", config, tmp_path / "out", "--quiet") == (0, "", "")


def test_quiet_still_prints_warnings(cli: Cli, paths: list[Path], tmp_path: Path) -> None:
    extra = {"embed.weight": torch.zeros(50, 16), "layers.0.weight": torch.zeros(16, 16)}
    extra |= {"norm": torch.zeros(16), "position_ids": torch.arange(16), "more": torch.zeros(2)}
    write_model(paths[1], extra)
    config = write_config(tmp_path / "config.yml", config_for("task_arithmetic", paths))
    run = cli("merge", config, tmp_path / "out", "--quiet")
    assert (run.code, run.out, run.complaints) == (0, "", [])
    assert "more" in run.err


def test_json_events_are_one_object_a_line_and_end_in_done(cli: Cli, config: Path, tmp_path: Path) -> None:
    run = cli("merge", config, tmp_path / "out", "--json")
    events = [json.loads(line) for line in run.out.splitlines()]
    assert (run.code, run.err) == (0, "")
    assert (events[0]["event"], events[0]["bytes_done"]) == ("start", 0)
    assert [event["event"] for event in events[-2:]] == ["commit", "done"]
    assert events[-1]["tensors"] == 4
    assert events[-1]["already_complete"] is False
    again = [json.loads(line) for line in cli("merge", config, tmp_path / "out", "--json").out.splitlines()]
    assert again[-1]["event"] == "done"
    assert again[-1]["already_complete"] is True


def test_the_profile_accounts_for_the_time_of_every_worker(cli: Cli, config: Path, tmp_path: Path) -> None:
    cli("merge", config, tmp_path / "out", "--profile", tmp_path / "profile.json")
    profile = json.loads((tmp_path / "profile.json").read_text())
    stages = profile["stages"]
    assert {"start", "read", "compute", "write", "checksum", "sync", "commit", "wait for work"} <= set(stages)
    in_workers = sum(v["wall"] for k, v in stages.items() if k not in ("start", "sync", "commit"))
    assert in_workers >= 0.99 * profile["workers"] * profile["seconds_with_chunks"] - 0.02
    assert (
        stages["compute"]["cpu"] <= profile["process"]["user_seconds"] + profile["process"]["system_seconds"]
    )
    assert profile["bytes_written"] > 0


def test_json_output_has_warnings_too(cli: Cli, paths: list[Path], tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yml", config_for("ties", paths, parameters={"int8_mask": True}))
    run = cli("merge", config, tmp_path / "out", "--json")
    assert run.code == 0
    assert "warning" in [json.loads(line)["event"] for line in run.out.splitlines()]


# --- the other commands


def test_plan_describes_the_merge_and_writes_nothing(cli: Cli, config: Path, tmp_path: Path) -> None:
    before = tree_of(tmp_path)
    run = cli("plan", config, "--memory", "1GiB")
    assert (run.code, run.err) == (0, "")
    for word in (
        "task_arithmetic",
        "tensors   4",
        "3 merge",
        "1 agree",
        "BF16",
        "model.safetensors",
        "1.0 GiB",
    ):
        assert word in run.out
    assert tree_of(tmp_path) == before


def test_plan_as_json_has_every_tensor(cli: Cli, config: Path) -> None:
    plan = json.loads(cli("plan", config, "--json").out)
    assert plan["method"] == "task_arithmetic"
    assert {tensor["name"] for tensor in plan["tensor_plan"]} == {*FEW, "position_ids"}
    assert plan["bytes_to_write"] == sum(shard["nbytes"] for shard in plan["shards"])


def test_inspect_lists_every_tensor(cli: Cli, paths: list[Path]) -> None:
    run = cli("inspect", paths[0])
    assert (run.code, run.err) == (0, "")
    assert all(name in run.out for name in FEW)
    assert "4 tensors, 1,088 elements" in run.out
    listed = json.loads(cli("inspect", paths[0], "--json").out)
    assert {tensor["name"]: tensor["shape"] for tensor in listed["tensors"]}["embed.weight"] == [50, 16]


def test_inspect_of_nothing_is_one_line(cli: Cli, tmp_path: Path) -> None:
    assert_refused(cli("inspect", tmp_path / "none"), "none")


def test_inspect_escapes_terminal_codes_in_names(cli: Cli, tmp_path: Path) -> None:
    write_model(tmp_path / "evil", {"a\x1b[31m\r\nb\x07\x9b": torch.zeros(3)})
    run = cli("inspect", tmp_path / "evil")
    assert run.code == 0
    assert "a\\x1b[31m\\r\\nb\\x07\\x9b" in run.out
    assert not {"\x1b", "\r", "\x07", "\x9b"} & set(run.out)
    listed = cli("inspect", tmp_path / "evil", "--json").out
    assert json.loads(listed)["tensors"][0]["name"] == "a\x1b[31m\r\nb\x07\x9b"
    assert "\x1b" not in listed


def test_a_merge_of_tensors_with_terminal_codes_in_their_names_succeeds_and_escapes_them(
    cli: Cli, tmp_path: Path
) -> None:
    name = "a\x1b[31m\nb"
    for i in range(2):
        write_model(tmp_path / f"m{i}", {name: torch.full((4,), float(i)), "n\x1b": torch.tensor([i])})
    models = [{"model": str(tmp_path / f"m{i}")} for i in range(2)]
    config = write_config(tmp_path / "config.yml", {"merge_method": "linear", "models": models})
    run = cli("merge", config, tmp_path / "out")
    assert (run.code, run.complaints) == (0, [])
    assert "\\x1b" in run.err
    assert "\x1b" not in run.err + run.out
    assert cli("verify", tmp_path / "out").code == 0


def test_methods_lists_all_and_shows_one(cli: Cli) -> None:
    run = cli("methods")
    assert run.code == 0
    assert {line.split()[0] for line in run.out.splitlines()} >= {"linear", "ties", "dare_ties"}
    one = cli("methods", "ties").out
    for word in ("density", "trim_scope", "arxiv.org", "base_model: required"):
        assert word in one
    assert_refused(cli("methods", "tyes"), "did you mean 'ties'?")


def test_verify_says_how_much_it_read_and_answers_in_json(cli: Cli, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cli("merge", config, out)
    run = cli("verify", out)
    assert (run.code, run.err) == (0, "")
    assert "all as written" in run.out
    verdict = json.loads(cli("verify", out, "--json").out)
    assert verdict["problems"] == []
    assert verdict["files"] == 4
    (out / "README.md").write_text("changed")
    edited = cli("verify", out)
    assert (edited.code, edited.err) == (0, "")
    assert "README.md: edited since" in edited.out
    assert json.loads(cli("verify", out, "--json").out)["edits"] == {"README.md": "edited since"}
    again = cli("merge", config, out)
    assert again.code == 0
    assert "README.md was edited since" in again.out
    (out / "config.json").write_text("{ }")
    assert_refused(cli("verify", out), "config.json")
    damaged = cli("verify", out, "--json")
    assert damaged.code == 2
    assert "config.json" in json.loads(damaged.out)["problems"][0]


@pytest.mark.parametrize(
    "arguments", [["merge"], ["mrge"], ["merge", "a", "b", "c"], ["merge", "--seed=-1", "a", "b"]]
)
def test_wrong_usage_exits_2_without_a_traceback(arguments: list[str], cli: Cli) -> None:
    run = cli(*arguments)
    assert run.code == 2
    assert "Traceback" not in run.err


def test_a_debug_variable_shows_the_traceback(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMMERGE_DEBUG", "1")
    run = cli("plan", tmp_path / "none.yml")
    assert run.code == 2
    assert "Traceback" in run.err
