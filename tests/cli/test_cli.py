"""The command line: exit codes, one line per refusal, machine-readable output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

import streammerge.cli
from tests.conftest import config_for, write_model

COMMANDS = ["merge", "plan", "verify", "inspect", "methods", "demo"]
FEW: dict[str, tuple[int, ...]] = {"embed.weight": (50, 16), "layers.0.weight": (16, 16), "norm": (16,)}


class Run(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        """The lines of stderr that are not warnings."""
        return [line for line in self.err.splitlines() if not line.startswith("warning:")]


Cli = Callable[..., Run]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs the command line in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: object) -> Run:
        monkeypatch.setattr(sys, "argv", ["streammerge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            streammerge.cli.main()
        captured = capsys.readouterr()
        return Run(int(stopped.value.code or 0), captured.out, captured.err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def shell(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "streammerge.cli", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, **options}
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, check=False, **options)


def write_config(path: Path, config: Any) -> Path:
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return path


@pytest.fixture
def paths(make_models: Callable[..., list[Path]]) -> list[Path]:
    return make_models(shapes=FEW)


@pytest.fixture
def config(paths: list[Path], tmp_path: Path) -> Path:
    return write_config(
        tmp_path / "config.yml", config_for("task_arithmetic", paths, parameters={"lambda": 0.5})
    )


def assert_refused(run: Run, *words: str) -> None:
    """Exit code 2, exactly one line, every word in it, no traceback."""
    assert run.code == 2, run
    assert len(run.complaints) == 1, run.err
    assert "Traceback" not in run.err
    assert "\x1b" not in run.err
    for word in words:
        assert word in run.complaints[0]


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


# --- refusals: the config and the models


def _nothing(paths: list[Path], config: dict[str, Any]) -> Any:
    return config


def _unknown_method(paths: list[Path], config: dict[str, Any]) -> Any:
    return {**config, "merge_method": "tyes"}


def _missing_model(paths: list[Path], config: dict[str, Any]) -> Any:
    return {**config, "models": [*config["models"], {"model": str(paths[0].parent / "nowhere")}]}


def _missing_base(paths: list[Path], config: dict[str, Any]) -> Any:
    return {**config, "base_model": str(paths[0].parent / "nowhere")}


def _no_base(paths: list[Path], config: dict[str, Any]) -> Any:
    return {key: value for key, value in config.items() if key != "base_model"}


def _unknown_key(paths: list[Path], config: dict[str, Any]) -> Any:
    return {**config, "modles": []}


def _unknown_parameter(paths: list[Path], config: dict[str, Any]) -> Any:
    return {**config, "parameters": {"densty": 0.5}}


def _bad_density(paths: list[Path], config: dict[str, Any]) -> Any:
    return {**config, "parameters": {"density": 1.5}}


def _missing_tensor(paths: list[Path], config: dict[str, Any]) -> Any:
    tensors = {"embed.weight": torch.zeros(50, 16), "norm": torch.zeros(16)}
    write_model(paths[2], {**tensors, "position_ids": torch.arange(16)})
    return config


def _wrong_shape(paths: list[Path], config: dict[str, Any]) -> Any:
    tensors = {"embed.weight": torch.zeros(51, 16), "layers.0.weight": torch.zeros(16, 16)}
    write_model(paths[2], {**tensors, "norm": torch.zeros(16), "position_ids": torch.arange(16)})
    return config


def _empty_model(paths: list[Path], config: dict[str, Any]) -> Any:
    (paths[1] / "model.safetensors").unlink()
    return config


def _short_model(paths: list[Path], config: dict[str, Any]) -> Any:
    file = paths[1] / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    return config


def _escape_in_a_missing_tensor(paths: list[Path], config: dict[str, Any]) -> Any:
    tensors = {name: torch.zeros(shape) for name, shape in FEW.items()}
    write_model(paths[0], {**tensors, "a\x1b[31m\nb": torch.zeros(3)})
    return config


def _yaml(text: str) -> Callable[[list[Path], dict[str, Any]], str]:
    return lambda paths, config: text


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_yaml("merge_method: [ties\n"), ["config.yml"]),
        (_yaml(""), ["config.yml"]),
        (_yaml("- a\n- b\n"), ["config.yml"]),
        (_yaml("merge_method: !!python/object/apply:os.system ['true']\n"), ["config.yml"]),
        (_yaml("merge_method: linear\n"), ["models"]),
        (_yaml("models: [a]\n"), ["merge_method"]),
        (_unknown_method, ["tyes", "did you mean 'ties'?"]),
        (_missing_model, ["nowhere"]),
        (_missing_base, ["nowhere"]),
        (_no_base, ["base_model"]),
        (_unknown_key, ["modles", "models"]),
        (_unknown_parameter, ["densty", "density"]),
        (_bad_density, ["density", "1.5"]),
        (_missing_tensor, ["layers.0.weight", "m2", "missing"]),
        (_wrong_shape, ["embed.weight", "[51, 16]", "[50, 16]"]),
        (_empty_model, ["m1"]),
        (_short_model, ["m1"]),
        (_escape_in_a_missing_tensor, ["a\\x1b[31m\\nb"]),
    ],
)
@pytest.mark.parametrize("command", ["merge", "plan"])
def test_a_bad_config_or_model_is_one_line_and_exit_2_before_anything_is_written(
    command: str, spoil: Any, words: list[str], cli: Cli, paths: list[Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path / "config.yml", spoil(paths, config_for("ties", paths)))
    run = cli(command, config, *([tmp_path / "out"] if command == "merge" else []))
    assert_refused(run, *words)
    assert run.out == ""
    assert not (tmp_path / "out").exists()


def test_a_missing_config_is_one_line(cli: Cli, tmp_path: Path) -> None:
    assert_refused(cli("merge", tmp_path / "none.yml", tmp_path / "out"), "none.yml", "No such file")


def test_a_directory_as_config_is_one_line(cli: Cli, tmp_path: Path) -> None:
    assert_refused(cli("plan", tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    ("memory", "word"),
    [("0", "0"), ("-1", "-1"), ("much", "much"), ("nan", "nan"), ("", "''"), ("1KiB", "at least")],
)
@pytest.mark.parametrize("command", ["merge", "plan"])
def test_an_impossible_memory_is_refused(
    command: str, memory: str, word: str, cli: Cli, config: Path, tmp_path: Path
) -> None:
    run = cli(command, config, *([tmp_path / "out"] if command == "merge" else []), f"--memory={memory}")
    assert_refused(run, word)
    assert not (tmp_path / "out").exists()


def test_a_huge_memory_is_accepted_and_not_allocated(cli: Cli, config: Path, tmp_path: Path) -> None:
    assert cli("merge", config, tmp_path / "out", "--memory=1024TiB").code == 0


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:99", "", "\x1b[31m", "cpu:1"])
def test_an_unknown_device_is_refused(device: str, cli: Cli, config: Path, tmp_path: Path) -> None:
    assert_refused(cli("merge", config, tmp_path / "out", "--device", device), "device")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["0", "-5", "big"])
def test_an_impossible_shard_size_is_refused(size: str, cli: Cli, config: Path, tmp_path: Path) -> None:
    assert_refused(cli("merge", config, tmp_path / "out", f"--shard-size={size}"))
    assert not (tmp_path / "out").exists()


# --- refusals: the output directory


def _tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_an_output_that_is_a_file_is_refused(cli: Cli, config: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert_refused(cli("merge", config, tmp_path / "out", "--overwrite"), "out", "not a directory")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_output_below_a_file_is_one_line(cli: Cli, config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    run = cli("merge", config, tmp_path / "file" / "out")
    assert run.code in (1, 2)
    assert len(run.complaints) == 1


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("which", [0, 1])
def test_an_output_that_is_an_input_is_refused_and_untouched(
    overwrite: list[str], which: int, cli: Cli, config: Path, paths: list[Path], tmp_path: Path
) -> None:
    before = _tree(paths[which])
    (tmp_path / "link").symlink_to(paths[which], target_is_directory=True)
    for out in (paths[which], tmp_path / "link"):
        assert_refused(cli("merge", config, out, *overwrite), "holds the input")
    assert _tree(paths[which]) == before


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_an_output_that_holds_a_foreign_model_is_refused_and_untouched(
    overwrite: list[str], cli: Cli, config: Path, tmp_path: Path
) -> None:
    write_model(tmp_path / "out", {"w": torch.zeros(3)})
    before = _tree(tmp_path / "out")
    assert_refused(cli("merge", config, tmp_path / "out", *overwrite), "did not make")
    assert _tree(tmp_path / "out") == before


def test_an_empty_output_directory_is_used(cli: Cli, config: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert cli("merge", config, tmp_path / "out").code == 0


def test_a_finished_merge_is_not_replaced_by_another_without_overwrite(
    cli: Cli, config: Path, paths: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert cli("merge", config, out).code == 0
    before = _tree(out)
    assert_refused(cli("merge", config, out, "--seed", "5"), "seed", "--overwrite")
    assert _tree(out) == before
    assert cli("merge", config, out, "--seed", "5", "--overwrite").code == 0
    assert json.loads((out / "streammerge.json").read_text())["seed"] == 5


# --- the other commands


def test_plan_describes_the_merge_and_writes_nothing(cli: Cli, config: Path, tmp_path: Path) -> None:
    before = _tree(tmp_path)
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
    assert _tree(tmp_path) == before


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


# --- as a process


def test_a_full_stdout_does_not_lose_the_merge(config: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        run = shell("merge", config, tmp_path / "out", stdout=full)
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    assert len(run.stderr.splitlines()) <= 1
    again = shell("merge", config, tmp_path / "out")
    assert again.returncode == 0
    assert "nothing was done" in again.stdout
    assert shell("verify", tmp_path / "out").returncode == 0


def test_a_full_stdout_in_the_middle_of_json_events_leaves_a_merge_that_can_be_resumed(
    config: Path, tmp_path: Path
) -> None:
    with open("/dev/full", "w") as full:
        run = shell("merge", config, tmp_path / "out", "--json", stdout=full)
    assert run.returncode != 0
    assert "Traceback" not in run.stderr
    assert shell("merge", config, tmp_path / "out").returncode == 0
    assert shell("verify", tmp_path / "out").returncode == 0


_HEAVY = """
import sys
from streammerge import cli
try:
    cli.main()
except SystemExit as stopped:
    print(stopped.code, *sorted({"numba", "torch", "rich", "safetensors"} & set(sys.modules)))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["merge", "none.yml", "out"]])
def test_help_and_config_errors_import_neither_numba_nor_torch(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HEAVY, *arguments]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    code = "2" if "none.yml" in arguments else "0"
    assert run.stdout.splitlines()[-1].split() == [code], run


def test_a_closed_stdout_is_no_traceback(make_models: Callable[..., list[Path]], tmp_path: Path) -> None:
    config = tmp_path / "c.yml"
    config.write_text(yaml.safe_dump(config_for("linear", make_models())))
    command = f"{sys.executable} -m streammerge.cli merge {config} {tmp_path / 'out'} >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
