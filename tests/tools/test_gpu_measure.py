"""The measurements of a GPU run to their end on one that memory plays, and no part can take the time of the next."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pytest

from streammerge.backends.registry import BACKENDS
from streammerge.planning import on_device

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS / "measure"))

import gpu  # noqa: E402
import gpu_whole  # noqa: E402
from gpu import DIFFERENT, UNFINISHED, Part, run_part, run_parts  # noqa: E402
from gpu_whole import Table, by_command, measure_merges, size_for  # noqa: E402


def test_every_part_runs_and_the_bytes_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "fused", BACKENDS["fused"])  # what the program replaces
    monkeypatch.setattr(on_device, "DEVICE_BYTES", on_device.DEVICE_BYTES)
    options = argparse.Namespace(work=tmp_path, size="1GB", device="cuda:0", fake=True, seconds=600.0)
    table = Table(tmp_path / "rows")
    for part in gpu.PARTS[1:]:
        run_part(part.name, table, options)
    found = (tmp_path / "rows").read_text()
    assert table.equal
    heads = [line[3:].split(" ")[0].strip(",:") for line in found.splitlines() if line.startswith("## ")]
    assert heads == ["Machine", "Start-up", "Start-up", "The", "Kernels", "The", "Whole"]
    assert found.count("| equal |") == len(gpu_whole.METHODS) * 2 + 9
    assert "DIFFERENT" not in found


def test_a_part_that_hangs_or_crashes_is_ended_and_its_rows_stay(tmp_path: Path) -> None:
    programs = {
        "hangs": "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); say('half'); time.sleep(600)",
        "crashes": "say('begun'); raise SystemExit(3)",
        "ends": "say('whole')",
        "differs": "say('DIFFERENT'); raise SystemExit(1)",
    }
    limits = list[float]()

    def command(part: Part, limit: float, rows: Path) -> list[str]:
        limits.append(limit)
        say = f"say = lambda text: open({str(rows)!r}, 'a').write(text + '\\n')"
        return [sys.executable, "-S", "-c", f"{say}\n{programs[part.name]}"]

    def run(*names: str, minutes: float = 10.0) -> tuple[int, list[str]]:
        out = tmp_path / "table.md"
        parts = [Part(name, 2.0 if name == "hangs" else 60.0) for name in names]
        code = run_parts(parts, minutes, out, command)
        return code, [line for line in out.read_text().splitlines() if line]

    assert run("hangs", "crashes", "ends") == (
        UNFINISHED,
        [
            "half",
            "**hangs: it was ended after 2 s**",
            "begun",
            "**crashes: not all of it was measured (exit code 3)**",
            "whole",
        ],
    )
    assert run("crashes", "differs", "ends")[0] == DIFFERENT
    assert run("ends") == (0, ["whole"])
    assert run("ends", minutes=0.0) == (UNFINISHED, ["**ends: no time was left**"])
    assert max(limits) <= 60.0


def test_whole_merges_are_as_large_as_time_and_disk_allow_and_end_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_whole, "_TRIED", 1 << 20)
    monkeypatch.setattr(gpu_whole, "seconds", lambda run: run() or 1.0)  # a disk of 1 MiB a second
    assert size_for(tmp_path, 10**12, 300.0) < 300 * (1 << 20) / 10
    assert size_for(tmp_path, 1 << 20, 10**9) == 1 << 20
    table, asked = Table(tmp_path / "rows"), list[float]()

    def merge(config: object, out: Path, device: str, left: float) -> float:
        asked.append(left)
        out.mkdir()
        (out / "streammerge.json").write_text(device)
        return 1.0

    monkeypatch.setattr(gpu_whole, "size_for", lambda work, most, left: 1 << 22)
    measure_merges(table, tmp_path, 0, ["cpu", "cuda:0"], merge, time.monotonic() - 1.0)
    assert not asked
    assert (table.equal, table.whole) == (True, False)
    measure_merges(table, tmp_path, 0, ["cpu", "cuda:0"], merge, time.monotonic() + 60.0)
    assert len(asked) == 12
    assert max(asked) <= 60.0
    assert not table.equal  # the outputs were not
    assert (tmp_path / "rows").read_text().count("DIFFERENT") == 6


def test_a_merge_that_fails_or_takes_too_long_is_a_cell_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(script))
    for text, found in (("echo 'a | b' >&2; exit 4", "a / b"), ("exec sleep 60", "ended after 0 s")):
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
        assert by_command({}, tmp_path / "out", "cuda:0", 0.5 if "sleep" in text else 60.0) == found
    assert json.loads((tmp_path / "out.yml").read_text()) == {}
