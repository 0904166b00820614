"""The benchmark's report says what was recorded, and one merge can be measured. No test asserts a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS / "measure"))

import bench  # noqa: E402
import bench_place  # noqa: E402
import disk_limit  # noqa: E402
from bench_measure import Case, Limit, Run, Usage, measure_limit  # noqa: E402
from bench_report import MIB, Results, report  # noqa: E402

MACHINE = {"CPU": "A CPU", "cores": "2", "memory": "8.0 GiB", "Python": "3.11", "torch": "2.5"}


def run_of(program: str, number: int, wall_s: float, cache: str = "cold", **more: object) -> Run:
    """A run of ties whose limit is 2 s and whose peak is 100 MiB and one more each time."""
    case = Case(program, str(more.pop("method", "ties")), "1GB", "" if program == "mergekit" else "512MiB")
    usage = Usage(0, wall_s, 1.0, 0.5, (100 + number) * MIB, 0.25)
    return Run(case, number, cache, 10**9, Limit(2.0, 2.0, 1.0), usage, input_nbytes=4 * 10**9, **more)  # type: ignore[arg-type]


def cells(text: str, method: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| `{method}`"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_tells_the_medians_the_range_of_the_ratio_and_the_highest_peak() -> None:
    runs = [run_of("streammerge", n, wall) for n, wall in enumerate([3.0, 8.0, 4.0])]
    row = cells(report(Results(MACHINE, {}, runs)), "ties")
    assert row == [
        "`ties`",
        "1.00",
        "512MiB",
        "3",
        "2.00",
        "4.00",
        "1.25",
        "2.00 (1.50–4.00)",
        "1.5",
        "0.38",
        "102",
    ]


def test_mergekit_stands_beside_the_merge_it_shares_and_nowhere_else() -> None:
    theirs = run_of("mergekit", 0, 20.0)
    runs = [run_of("streammerge", 0, 4.0), theirs, run_of("streammerge", 0, 4.0, method="ties-model")]
    text = report(Results(MACHINE | {"mergekit": "0.1.5"}, {"streammerge": 1.0}, runs))
    assert cells(text, "ties")[-5:] == ["1", "20.0", "10.00", "100", "5.0"]
    assert cells(text, "ties-model")[-5:] == [""] * 5


def test_an_earlier_checkout_stands_beside_the_same_merge() -> None:
    runs = [
        run_of("streammerge", 0, 4.0),
        run_of("before", 0, 6.0),
        run_of("streammerge", 0, 4.0, method="della"),
    ]
    text = report(Results(MACHINE, {}, runs))
    assert cells(text, "ties")[-4:] == ["3.00", "0.38", "100", "1.00"]
    assert cells(text, "della")[-4:] == [""] * 4


def test_the_limit_reads_every_byte_and_writes_as_many_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [tmp_path / "a", tmp_path / "b"]
    inputs[0].write_bytes(bytes((8 << 20) + 1))
    inputs[1].write_bytes(b"1")
    read, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *where: read.append(preadv(*where)))
    disk_limit.measure(tmp_path / "out", 5 << 20, inputs)
    assert sorted(read) == [1, 1, 4 << 20, 4 << 20]
    assert (tmp_path / "out").stat().st_size == 8 << 20


def test_the_limit_is_the_later_of_its_two_ends_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    limit = measure_limit(tmp_path / "zeros", [tmp_path / "a"], 100)
    assert limit.limit_s == max(limit.read_s, limit.write_s) > 0
    assert limit.way in ("direct", "buffered")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_warm_runs_and_runs_of_an_untouched_cache_have_tables_of_their_own() -> None:
    runs = [run_of("streammerge", 0, 4.0, cache) for cache in ("cold", "as found", "warm")]
    text = report(Results(MACHINE, {}, runs))
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## Cold page cache", "## Page cache as found", "## Warm page cache"]


def test_a_failed_run_is_quoted_and_counts_in_no_figure() -> None:
    runs = [run_of("streammerge", 0, 4.0), run_of("streammerge", 1, 0.1, failure="exit code 3\nno room")]
    text = report(Results(MACHINE, {}, runs))
    assert cells(text, "ties")[3:6] == ["1", "2.00", "4.00"]
    assert "streammerge `ties` 1GB 512MiB, run 2, cold:\n\n    exit code 3\n    no room" in text


def test_a_report_of_failures_alone_can_be_made() -> None:
    assert "FAILED" in report(Results(MACHINE, {}, [run_of("streammerge", 0, 0.1, failure="exit code 3")]))


def test_the_json_file_gives_the_same_results_back(tmp_path: Path) -> None:
    results = Results(MACHINE, {"streammerge": 1.0}, [run_of("streammerge", 0, 4.0, failure="exit code 1")])
    results.save(tmp_path / "bench.json")
    assert Results.load(tmp_path / "bench.json") == results


def test_render_needs_no_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(MACHINE, {}, [run_of("streammerge", 0, 4.0)])
    results.save(tmp_path / "bench.json")
    assert bench.main(["--render", str(tmp_path / "bench.json")]) == 0
    assert capsys.readouterr().out == (tmp_path / "bench.md").read_text() == report(results)


@pytest.mark.parametrize("nbytes", [10**7, 10**8, 17 * 10**8, 10**10, 10**11])
def test_a_shape_has_about_the_size_asked_for(nbytes: int) -> None:
    shape = bench_place.shape_of(nbytes)
    per_layer = 3 * shape["inter"] * shape["hidden"] + 2 * shape["hidden"] * (shape["hidden"] + shape["kv"])
    made = 2 * (2 * shape["vocab"] * shape["hidden"] + shape["layers"] * per_layer)
    assert abs(made - nbytes) < 0.1 * nbytes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "either WORKDIR or --render"),
        (["w", "--render", "x.json"], "either WORKDIR or --render"),
        (["w", "--methods", "tie"], "unknown tie"),
        (["w", "--sizes", "big"], "is not a size"),
        (["w", "--memory", ","], "--memory is empty"),
        (["w", "--runs", "0"], "a number from 1"),
    ],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.parse_args(arguments)
    assert words in capsys.readouterr().err


def test_one_pair_is_measured_and_leaves_nothing_but_its_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the caches of all other tests; an empty one would have the kernels compiled.
    monkeypatch.setattr(bench.Bench, "environment", lambda self, program: {})
    place = bench_place.Workplace(tmp_path)
    place.make_models(bench.TINY)
    case = Case("streammerge", "linear", bench.TINY, "512MiB")
    run = bench.Bench(place, None, drop=False).pair(case, 0)
    assert (run.failure, run.cache, run.usage.exit_code) == ("", "as found", 0)
    assert 0 < run.usage.peak_nbytes <= 512 * MIB
    assert sorted(path.name for path in tmp_path.iterdir()) == ["linear-tiny.yml", "models-tiny"]


def test_a_command_that_fails_is_a_failure_with_its_words(tmp_path: Path) -> None:
    script = "import sys; print('said'); sys.exit('wept')"
    usage, words = bench.measure([sys.executable, "-c", script], {})
    assert (usage.exit_code, sorted(words.split())) == (1, ["said", "wept"])


def test_diagonals_have_the_names_and_shapes_of_the_model_and_are_positive(tmp_path: Path) -> None:
    size = ["--layers", "1", "--hidden", "16", "--inter", "32", "--kv", "16", "--vocab", "64"]
    subprocess.run(
        [sys.executable, TOOLS / "make" / "make_models.py", tmp_path, "--models", "0", *size],
        check=True,
        capture_output=True,
    )
    out = tmp_path / "diagonal.safetensors"
    command = [sys.executable, TOOLS / "make" / "make_diagonals.py", tmp_path / "base", out]
    subprocess.run(command, check=True, capture_output=True)
    diagonal = load_file(out)
    raw = (tmp_path / "base" / "model.safetensors").read_bytes()
    entries = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert {name: list(values.shape) for name, values in diagonal.items()} == {
        name: entry["shape"] for name, entry in entries.items() if name != "__metadata__"
    }
    for values in diagonal.values():
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
        assert (values > 0).all()
