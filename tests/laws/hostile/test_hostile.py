"""Every case of the table through the command itself: answered in one line, and nothing harmed.

Of each: the exit code, the words, no traceback, no character that a terminal would act on; no output that loads, and
nothing outside OUT, unless it was to be merged; the inputs as they were; under 600 MiB and 10 s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.laws.hostile.case import MEAN, Case, sound, state
from tests.laws.hostile.cases import SECTIONS

MOST_BYTES, MOST_SECONDS = 600 << 20, 10.0
CASES = [(section, case) for section, cases in SECTIONS.items() for case in cases()]
spent: dict[str, list[tuple[float, int]]] = {}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function that runs the command; see tests/laws/hostile/server.py."""
    scratch = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "tests.laws.hostile.server", str(scratch)]
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        requests, answers = process.stdin, process.stdout
        assert requests is not None
        assert answers is not None

        def ask(arguments: tuple[str, ...], cwd: Path) -> dict[str, Any]:
            requests.write(json.dumps({"arguments": arguments, "cwd": str(cwd), "seconds": 60}) + "\n")
            requests.flush()
            answer: dict[str, Any] = json.loads(answers.readline())
            return answer

        yield ask
    for section, values in spent.items():
        peak, seconds = max(p for _, p in values) >> 20, max(s for s, _ in values)
        print(f"{section}: {len(values)} cases, at most {peak} MiB and {seconds:.1f} s")


@pytest.mark.parametrize(("section", "case"), CASES, ids=[f"{s}: {c.what}"[:90] for s, c in CASES])
def test_it_is_answered_in_one_line_and_nothing_is_harmed(
    section: str, case: Case, server: Any, tmp_path: Path
) -> None:
    sound(tmp_path)
    case.build(tmp_path)
    before, out_before = state(tmp_path), state_of_out(tmp_path)
    answer = server(case.arguments, tmp_path)
    spent.setdefault(section, []).append((answer["seconds"], answer["peak"]))
    code, lines = answer["code"], answer["stderr"].splitlines()
    context = (code, answer["stderr"][:1000])

    assert "Traceback" not in answer["stderr"], context
    assert all(line.isprintable() for line in lines), context
    assert answer["seconds"] < MOST_SECONDS
    assert answer["peak"] < MOST_BYTES
    assert state(tmp_path) == before, "something outside OUT has changed"
    assert not (tmp_path / "evil").exists()
    accepted = {"refused": (2,), "failed": (1, 2), "either": (0, 2)}.get(case.expect, (0,))
    assert code in accepted, context
    if code == 0:
        assert_merged(case, tmp_path, lines)
    else:
        assert_refused(case, tmp_path, lines, out_before)


def assert_refused(case: Case, directory: Path, lines: list[str], out_before: dict[str, str]) -> None:
    usage = lines[:1] and lines[0].startswith("Usage:")
    said = [line for line in lines if not line.startswith("warning: ")]
    assert usage or len(said) == 1, said
    assert case.words in (" ".join(said)), said
    assert all(len(line) < 6000 for line in said)
    if case.keep_out:
        assert state_of_out(directory) == out_before
    left = os.listdir(directory / "out") if (directory / "out").is_dir() and not case.keep_out else []
    assert not {"model.safetensors", "model.safetensors.index.json", "zarr.json"} & set(left)


def assert_merged(case: Case, directory: Path, lines: list[str]) -> None:
    assert all(line.startswith("warning: ") for line in lines), lines
    assert case.words in " ".join(lines), lines
    merged = {}
    for path in (directory / "out").glob("*.safetensors"):
        merged |= load_file(path) if case.expect == "mean" else {}
    if case.expect == "mean":
        assert (merged["w"] == MEAN).all()
        assert (merged["n"] == MEAN).all()


def state_of_out(directory: Path) -> dict[str, str]:
    out = directory / "out"
    if out.is_dir() and not out.is_symlink():
        return state(out)
    return {"": os.readlink(out) if out.is_symlink() else out.read_text()} if os.path.lexists(out) else {}


def test_the_table_has_the_cases_it_is_to_have() -> None:
    assert len(CASES) >= 250
    assert set(SECTIONS) == {section for section, _ in CASES}
