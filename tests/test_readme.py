"""The steps of README.md work, and its table is what `plan` says."""

from __future__ import annotations

import re
import shlex
import signal
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import streammerge.cli
from tests.checkpoint.tokenizers.scene import write_tokenizer
from tests.estimate.network.tiny import make_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "tools" / "measure"))

import plan_table  # noqa: E402

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}{% if add_generation_prompt %}: {% endif %}"


def blocks(section: str, language: str = "") -> list[str]:
    """Return the code blocks of a section."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    every = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in every if name == language]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of the hub, in an empty directory."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    yield tmp_path / "hub"
    for number, handler in handlers.items():
        signal.signal(number, handler)


def download(hub: Path, name: str, seed: int) -> None:
    """Put a small model of the same architecture where `hf download` puts the real one."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / f"{seed:040d}"
    make_model("qwen2, tied", snapshot, torch.bfloat16, seed)
    characters = {c: i for i, c in enumerate(string.printable[:95] + "\n")}
    write_tokenizer(snapshot, characters, chat_template=TEMPLATE)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)


def run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a line of a shell."""
    monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
    with pytest.raises(SystemExit) as stopped:
        streammerge.cli.main()
    assert not stopped.value.code, line


def test_the_first_merge_of_the_readme_runs_on_models_of_these_names(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    downloads, commands = blocks("A first merge")
    names = re.findall(r"^hf download (\S+)$", downloads, re.MULTILINE)
    (config,) = blocks("A first merge", "yaml")
    loaded = yaml.safe_load(config)
    assert set(names) == {loaded["base_model"], *(m["model"] for m in loaded["models"])}
    for seed, name in enumerate(names):
        download(hub, name, seed)
    Path("first.yml").write_text(config)
    for line in commands.splitlines():
        run(line, monkeypatch)
    capsys.readouterr()
    for text in blocks("A first merge", "python"):
        exec(compile(text, "README.md", "exec", dont_inherit=True), {"__name__": "readme"})
    shown = capsys.readouterr().out
    assert shown.startswith("Whyistheskyblue?:")  # the stand-in has no token for what joins words
    assert shown.endswith("tensors\n")


def test_the_table_of_memory_disk_and_time_is_what_plan_says() -> None:
    written = README.split(plan_table.BEGIN)[1].split(plan_table.END)[0]
    rows = plan_table.rows(["7B"])
    assert len(rows) == len(plan_table.METHODS)
    assert all(row in written for row in rows)


def test_the_figures_beside_mergekit_are_those_of_the_performance_page() -> None:
    page = next((ROOT / "docs").rglob("performance.md")).read_text()
    for method in ("ties", "linear"):
        row = next(
            line
            for line in page.splitlines()
            if re.match(rf"\| `{method}` \| cold \| [\d.]+ \| \d+ \|", line)
        )
        _, _, _, ours, our_peak, theirs, their_peak, *_ = (cell.strip() for cell in row.split("|"))
        assert f"| {ours} s, {our_peak} MiB | {theirs} s, {their_peak} MiB |" in README


def test_the_recording_is_one_small_picture_that_runs_nothing_and_fetches_nothing() -> None:
    (name,) = re.findall(r"!\[.*?\]\((.*?\.svg)\)", README)
    picture = (ROOT / name).read_text()
    assert len(picture) < 500_000
    assert not re.search(r"<script|<foreignObject|@import|url\(|href=\"(?!#)|\bon\w+=", picture)
    for seen in ("streammerge merge", "Ctrl-C", "resuming:", "all as written"):
        assert seen in picture
