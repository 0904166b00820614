"""The commands that show something: a config to start from, tensors, stores, completion, help."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.shell_completion import ShellComplete

from streammerge.api import plan
from streammerge.cli import cli as group
from streammerge.estimate.fisher.importing import import_diagonal
from streammerge.methods.catalog import load_builtin
from streammerge.methods.registry import all_methods
from streammerge.report.example import commented_config, example_config
from tests.cli.running import Cli, assert_refused
from tests.conftest import write_fisher, write_grams, write_model, write_models
from tests.patience import PATIENCE

load_builtin()
BUILT_IN = [name for name, method in all_methods().items() if method.origin == "built in"]


# --- a config to start from


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the models and stores that printed configs name."""
    root = tmp_path_factory.mktemp("new")
    found = write_models(root, 5, shapes={"model.layers.0.mlp.weight": (12, 12), "norm": (12,)})
    (root / "models").mkdir()
    for path, name in zip(found, ("base", "math", "code", "chat", "law", "biology"), strict=True):
        place = path.rename(root / "models" / name)
        if name != "base":
            import_diagonal(str(place), str(write_fisher(place)), root / f"{name}.zarr")
            write_grams(place).rename(root / f"{name}-gram.zarr")
    return root


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_printed_config_is_accepted_as_it_is(
    name: str, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scene)
    method = all_methods()[name]
    for text in (commented_config(method), example_config(method)):
        decided = plan(yaml.safe_load(text), memory="1GiB")
        assert decided.method is method


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_printed_config_names_every_parameter_and_its_comments_are_accepted_too(
    name: str, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scene)
    method = all_methods()[name]
    text = commented_config(method)
    kept = []
    for line in text.splitlines():
        bare = line.replace("# ", "", 1) if line.lstrip().startswith("# ") else line
        name_of_it = bare.strip().partition(":")[0]
        # Defaults that stand for nothing, and a drop beside what a method drops by itself, are not for setting.
        if name_of_it in method.parameters or name_of_it == "parameters":
            kept.append(line if "null" in bare or "drop" in name_of_it else bare)
        elif not line.startswith("#"):
            kept.append(line)
    assert plan(yaml.safe_load("\n".join(kept)), memory="1GiB").method is method
    assert all(f"{parameter}:" in text for parameter in method.parameters)


def test_new_prints_the_config_alone(cli: Cli) -> None:
    run = cli("new", "ties")
    assert (run.code, run.err) == (0, "")
    assert yaml.safe_load(run.out)["merge_method"] == "ties"
    assert_refused(cli("new", "tyes"), "did you mean 'ties'?")


def test_a_method_of_ones_own_has_a_config_too(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import streammerge\n"
        "@streammerge.method('half_way_of_new', base='required', models=(1, 1))\n"
        "def half_way(models, base, *, share: float, keep: bool = True):\n"
        "    '''Go a part of the way.'''\n"
        "    return base + share * (models[0] - base)\n"
    )
    config = yaml.safe_load(cli("new", "half_way_of_new", "--methods", file).out)
    assert config["parameters"] == {"share": 0.5}
    assert len(config["models"]) == 1


def test_methods_shows_an_example(cli: Cli) -> None:
    shown = cli("methods", "slerp").out
    assert "example:" in shown
    assert yaml.safe_load(shown.partition("example:\n")[2])["parameters"] == {"t": 0.5}


# --- tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {f"layers.{i}.{kind}.weight": torch.zeros(2, 3) for i in range(30) for kind in ("q", "mlp")}
    return write_model(tmp_path_factory.mktemp("inspect") / "model", tensors)


def test_inspect_shows_totals_first_and_a_part_of_the_tensors(cli: Cli, model: Path) -> None:
    lines = cli("inspect", model).out.splitlines()
    assert lines[0].startswith("60 tensors, 360 elements, 1.4 KiB (F32 1.4 KiB) in 1 file")
    assert len(lines) == 22
    assert lines[-1] == "… and 40 more: --all lists them, a PATTERN selects"
    assert len(cli("inspect", model, "--all").out.splitlines()) == 61


def test_inspect_takes_a_pattern(cli: Cli, model: Path) -> None:
    lines = cli("inspect", model, r"\.1\d\.q").out.splitlines()
    assert lines[1] == "10 tensors of these match, 240 B"
    assert len(lines) == 12
    listed = json.loads(cli("inspect", model, r"\.1\d\.q", "--json").out)
    assert len(listed["tensors"]) == 10
    assert_refused(cli("inspect", model, "("), "not a regular expression")


# --- stores


def test_a_store_of_the_other_kind_is_called_by_its_name(cli: Cli, scene: Path) -> None:
    run = cli("fisher", "info", scene / "math-gram.zarr")
    assert_refused(run, "a store of Gram matrices", "streammerge gram info")
    assert_refused(
        cli("gram", "info", scene / "math.zarr"), "a store of Fisher diagonals", "streammerge fisher info"
    )


def test_gram_info_shows_the_matrices(cli: Cli, scene: Path) -> None:
    run = cli("gram", "info", scene / "math-gram.zarr")
    assert (run.code, run.err) == (0, "")
    assert "matrices   1, " in run.out
    assert "12 x 12  model.layers.0.mlp.weight" in run.out
    table = json.loads(cli("gram", "info", scene / "math-gram.zarr", "--json").out)
    assert list(table["tensors"]) == ["model.layers.0.mlp.weight"]


# --- completion and help


def completed(arguments: list[str], incomplete: str) -> list[tuple[str, str]]:
    complete = ShellComplete(group, {}, "streammerge", "_STREAMMERGE_COMPLETE")
    return [(item.type, item.value) for item in complete.get_completions(arguments, incomplete)]


def test_commands_methods_files_and_directories_complete() -> None:
    assert ("plain", "merge") in completed([], "me")
    assert completed(["methods"], "tie") == [("plain", "ties")]
    assert completed(["new"], "dare_") == [
        ("plain", name) for name in ("dare_fisher", "dare_linear", "dare_ties")
    ]
    assert completed(["merge"], "c") == [("file", "c")]
    assert completed(["merge", "c.yml"], "o") == [("file", "o")]
    assert completed(["verify", "out", "--against"], "c") == [("file", "c")]
    assert completed(["fisher", "compute", "m", "--data"], "d") == [("file", "d")]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_prints_a_script(shell: str, cli: Cli) -> None:
    run = cli("completion", shell)
    assert run.code == 0
    assert "_STREAMMERGE_COMPLETE" in run.out


def commands(command: click.Command, path: str = "") -> list[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        return [(path, command)]
    inner = command.commands.items()
    return [found for name, each in inner for found in commands(each, f"{path} {name}".strip())]


@pytest.mark.parametrize("path", [path for path, _ in commands(group)])
def test_every_command_has_an_example_of_itself(path: str, cli: Cli) -> None:
    assert f"streammerge {path}" in cli(*path.split(), "--help").out.partition("Examples:")[2]


def test_the_list_of_commands_says_each_in_a_whole_line(cli: Cli) -> None:
    listed = cli("--help").out.partition("Commands:")[2].partition("Examples:")[0].split("\n\n")[0]
    lines = [line for line in listed.splitlines() if line]
    assert [line.split()[0] for line in lines] == list(group.commands)
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


def test_the_options_of_merge_stand_in_sections(cli: Cli) -> None:
    shown = cli("merge", "--help").out
    titles = [line for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == [
        "Memory and speed:",
        "Output:",
        "Methods and randomness:",
        "Object stores (s3://, gs://, az://):",
        "Messages:",
        "Options:",
        "Mergekit compatibility:",
    ]
    assert "--quiet / --no-quiet" not in shown
    assert "--random-seed" in shown.partition("Mergekit compatibility:")[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "c", "o", "--memory", "0"], ["--memory", "positive"]),
        (["merge", "c", "o", "--memory", "10"], ["--memory", "did you mean 10GiB?"]),
        (["plan", "c", "--memory", "2048"], ["--memory", "did you mean 2048GiB?"]),
        (["merge", "c", "o", "--shard-size", "0"], ["--shard-size", "positive"]),
        (["merge", "c", "o", "--out-shard-size", "x"], ["--out-shard-size", "not a size"]),
        (["plan", "c", "--threads", "0"], ["--threads", "1 to 1024"]),
        (["plan", "c", "--threads", "many"], ["--threads", "whole number"]),
        (["plan", "c", "--seed", "-1"], ["--seed"]),
        (["mrge"], ["mrge", "merge", "streammerge --help"]),
        (["merge"], ["CONFIG", "streammerge merge --help"]),
        (["merge", "c", "o", "--memroy", "1GiB"], ["--memroy", "--memory"]),
        (["merge", "c", "o", "--io", "fast"], ["--io", "direct"]),
        (["verify", "o", "--all"], ["--against"]),
    ],
)
def test_wrong_usage_is_one_line_that_names_the_option(
    arguments: list[str], words: list[str], cli: Cli
) -> None:
    run = cli(*arguments)
    assert_refused(run, *words)
    assert run.err.startswith("streammerge: ")
    assert run.out == ""


def test_a_group_without_a_command_shows_its_help(cli: Cli) -> None:
    for arguments in ((), ("fisher",), ("gram",)):
        run = cli(*arguments)
        assert "Commands:" in run.out
        assert run.err == ""


def test_the_package_is_a_program() -> None:
    command = [sys.executable, "-m", "streammerge", "-V"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.startswith("streammerge, version ")


def test_lines_wrap_between_words_on_a_terminal(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    monkeypatch.setattr("streammerge.report.wrapping.terminal_width", lambda: 60)
    text = cli("methods").out
    assert max(map(len, text.splitlines())) <= 60
    assert " ".join(text.split()).count("where the importance reaches the tensor's median + 1.5") == 1
    assert max(map(len, cli("methods", "ties").out.splitlines())) <= 60


def test_the_page_names_every_environment_variable_that_is_looked_at() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "use" / "cli.md").read_text()
    sources = "".join(path.read_text() for path in (root / "streammerge").rglob("*.py"))
    names = set(re.findall(r"""environ(?:\.get\(|\[)"(\w+)\"""", sources)) | {"HF_HUB_CACHE"}
    assert len(names) >= 5
    assert {name for name in names if f"`{name}" not in page} <= {"PYTHONPATH", "TERM", "TRITON_INTERPRET"}
