"""What a sweep keeps, records and refuses: scores, --keep, --disk, other directories, interruptions."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.api import merge, plan, sweep, verify
from streammerge.api import sweep_run as run_module
from streammerge.api.sweep_run import SweepRun
from streammerge.api.sweeping import Sweep
from streammerge.errors import ConfigError, InputError, ModelError, OutputError, WorldError
from streammerge.events import Event
from streammerge.io import allocate
from streammerge.output import sweep_record
from streammerge.output.journal import Journal
from streammerge.output.place import CONFIG_COPY
from streammerge.output.shards import ShardWriter
from streammerge.output.sweep_record import SweepRecord
from streammerge.planning.sweep import nbytes_of_point
from streammerge.testing.models import read_tensors, write_model
from tests.conftest import config_for, output_bytes
from tests.laws.resume.traps import Trap, guarded

SHAPES = {"model.layers.0.mlp.down_proj.weight": (40, 64), "scalar": ()}
LAMBDAS = [0.1, 0.2, 0.3, 0.4]
BY_LAMBDA = "case {} in *0.1) echo 5;; *0.2) echo 8;; *0.3) echo 8;; *) echo 1;; esac"
"""Scores of the four points: 5, 8, 8, 1."""


@pytest.fixture
def config(make_models: Callable[..., list[Path]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)
    monkeypatch.setattr("streammerge.engine.scheduler._SYNC_SECONDS", 0.001)
    return config_for("task_arithmetic", make_models(2, shapes=SHAPES), sweep={"lambda": LAMBDAS})


def swept(config: Mapping[str, Any], out: Path, **options: Any) -> Sweep:
    return sweep(config, out, **{"on_event": lambda event: None, "device": "cpu", **options})


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def points_in(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.is_dir())


# --- scores


def test_points_are_scored_and_the_first_best_is_marked(config: dict[str, Any], tmp_path: Path) -> None:
    events: list[Event] = []
    result = swept(config, tmp_path / "out", score=BY_LAMBDA, on_event=events.append)
    assert result.best == "lambda=0.2"
    assert [(row["lambda"], row["score"], row["reason"]) for row in rows_of(tmp_path / "out")] == [
        ("0.1", "5.0", ""),
        ("0.2", "8.0", ""),
        ("0.3", "8.0", ""),
        ("0.4", "1.0", ""),
    ]
    assert all(float(row["seconds"]) > 0 for row in rows_of(tmp_path / "out"))
    assert [event.values["score"] for event in events if event.kind == "point"] == [5, 8, 8, 1]
    assert points_in(tmp_path / "out") == [f"lambda={value}" for value in LAMBDAS]
    point = tmp_path / "out" / "lambda=0.3"
    assert not verify(point, against=point / CONFIG_COPY, progress=False).problems


def test_a_point_whose_command_fails_is_tried_again_and_the_others_are_not(
    config: dict[str, Any], tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    command = f"echo {{}} >> {log}; case {{}} in *0.2) test -e {tmp_path}/mended || exit 7;; esac; echo 3"
    first = swept(config, out, score=command)
    assert first.failed == ("lambda=0.2",)
    assert [row["score"] for row in rows_of(out)] == ["3.0", "", "3.0", "3.0"]
    assert rows_of(out)[1]["reason"] == "the command ended with exit code 7"
    (tmp_path / "mended").touch()
    second = swept(config, out, score=command)
    assert second.failed == ()
    assert second.bytes_written == 0
    assert [row["score"] for row in rows_of(out)] == ["3.0"] * 4
    assert [Path(line).name for line in log.read_text().split()] == [
        *(f"lambda={value}" for value in LAMBDAS),
        "lambda=0.2",
    ]


# --- what is kept


def test_a_command_that_changes_its_point_gives_no_score(config: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = "case {} in *0.2) rm {}/model.safetensors;; *0.3) rm -r {};; esac; echo 3"
    assert swept(config, out, score=command).failed == ("lambda=0.2", "lambda=0.3")
    assert [row["score"] for row in rows_of(out)] == ["3.0", "", "", "3.0"]
    assert rows_of(out)[2]["reason"] == "the command changed or removed files of the point"
    assert not swept(config, out, score="echo 4; : {}", overwrite=True).failed


def test_points_that_were_removed_are_merged_again_if_more_are_kept_now(
    config: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    swept(config, out, score=BY_LAMBDA, keep="best")
    assert [row["reason"] for row in rows_of(out)] == ["removed", "", "removed", "removed"]
    swept(config, out, score=BY_LAMBDA, keep=2)
    assert points_in(out) == ["lambda=0.2", "lambda=0.3"]
    swept(config, out)
    assert points_in(out) == [f"lambda={value}" for value in LAMBDAS]
    assert [row["reason"] for row in rows_of(out)] == [""] * 4


@pytest.mark.parametrize(
    ("keep", "kept"), [("best", ["0.2"]), (2, ["0.2", "0.3"]), (9, ["0.1", "0.2", "0.3", "0.4"])]
)
def test_only_the_best_stay(keep: Any, kept: list[str], config: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    swept(config, out, score=BY_LAMBDA, keep=keep)
    assert points_in(out) == [f"lambda={value}" for value in kept]
    assert len(rows_of(out)) == 4
    again = swept(config, out, score=BY_LAMBDA, keep=keep)
    assert (again.bytes_written, again.best) == (0, "lambda=0.2")
    assert points_in(out) == [f"lambda={value}" for value in kept]


def test_points_without_a_score_go_first_and_are_merged_again_next_time(
    config: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = f"case {{}} in *0.4) test -e {tmp_path}/mended || exit 1; echo 99;; esac; echo 3"
    assert swept(config, out, score=command, keep="best").failed == ("lambda=0.4",)
    assert points_in(out) == ["lambda=0.1"]
    (tmp_path / "mended").touch()
    assert swept(config, out, score=command, keep="best").failed == ()
    assert points_in(out) == ["lambda=0.1"]
    assert [row["score"] for row in rows_of(out)] == ["3.0"] * 4


def test_room_for_two_points_is_enough_to_keep_the_best(config: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = swept(config, tmp_path / "whole")
    size = nbytes_of_point(plan(tmp_path / "whole" / "lambda=0.1" / CONFIG_COPY))
    assert sum(map(len, output_bytes(tmp_path / "whole" / "lambda=0.1").values())) < size
    command = f"ls -d {out}/lambda* | wc -l >> {tmp_path}/log; {BY_LAMBDA}"
    result = swept(config, out, score=command, keep="best", disk=int(2.2 * size))
    most = [int(line) for line in (tmp_path / "log").read_text().split()]
    assert max(most) == 2
    assert result.best == "lambda=0.2"
    assert result.bytes_read > whole.bytes_read
    assert output_bytes(out / "lambda=0.2") == output_bytes(tmp_path / "whole" / "lambda=0.2")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "4 points of SIZE need SIZE: give more, or --score with a smaller --keep"),
        ({"score": "echo 1 {}", "keep": 3}, "4 points of SIZE need SIZE: give more"),
        (
            {"score": "echo 1 {}", "keep": 2},
            "2 points kept and a new one, of SIZE each, need SIZE: give more",
        ),
    ],
)
def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(
    options: dict[str, Any], words: str, config: dict[str, Any], tmp_path: Path
) -> None:
    pattern = f"--disk SIZE is too small: {words}".replace("SIZE", r"\d[\d.]* KiB")
    with pytest.raises(InputError, match=pattern):
        swept(config, tmp_path / "out", disk=50_000, **options)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_refused_before_the_first_byte(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SweepRun, "_free", lambda self: 12_000)
    with pytest.raises(
        WorldError, match=r"needs [\d.]+ KiB for 4 of 4 points at a time, [\d.]+ KiB are free"
    ):
        swept(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    swept(config, tmp_path / "out", score=BY_LAMBDA, keep="best")
    monkeypatch.setattr(SweepRun, "_free", lambda self: 0)
    assert swept(config, tmp_path / "out", score=BY_LAMBDA, keep="best").best == "lambda=0.2"


# --- interruptions


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (ShardWriter, "write", 3),
        (ShardWriter, "publish", 2),
        (Journal, "add", 2),
        (Journal, "remove", 3),
        (SweepRecord, "save", 2),
        (SweepRecord, "save", 4),
        (run_module, "remove_tree", 1),
        (run_module, "remove_tree", 2),
        (run_module, "score", 3),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).rpartition(".")[2],
)
def test_a_kill_at_any_point_is_continued(
    owner: Any, name: str, at: int, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    out, options = tmp_path / "out", {"score": BY_LAMBDA, "keep": 2}
    trap = Trap(Killed(), at, once=False)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, guarded(getattr(owner, name), trap))
        with pytest.raises(Killed):
            swept(config, out, **options)
    result = swept(config, out, **options)
    assert [(row["lambda"], row["score"]) for row in rows_of(out)] == [
        ("0.1", "5.0"),
        ("0.2", "8.0"),
        ("0.3", "8.0"),
        ("0.4", "1.0"),
    ]
    assert result.best == "lambda=0.2"
    assert points_in(out) == ["lambda=0.2", "lambda=0.3"]
    for point in points_in(out):
        merge(out / point / CONFIG_COPY, tmp_path / point, on_event=lambda event: None, device="cpu")
        assert output_bytes(out / point) == output_bytes(tmp_path / point)


def test_a_removal_that_was_interrupted_is_ended(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def torn(path: Path) -> None:
        (path / "model.safetensors").unlink()
        raise WorldError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "remove_tree", torn)
        with pytest.raises(WorldError):
            swept(config, out, score=BY_LAMBDA, keep="best")
    assert "lambda=0.1" in points_in(out)
    swept(config, out, score=BY_LAMBDA, keep="best")
    assert points_in(out) == ["lambda=0.2"]


def test_a_disk_that_fills_up_ends_in_one_line_and_is_continued(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        full = Trap(OSError(errno.ENOSPC, "No space left on device"), 3, once=False)

        def fallocate(descriptor: int, nbytes: int) -> None:
            full()

        patch.setattr(allocate, "fallocate", fallocate)
        with pytest.raises(
            WorldError, match="No space left on device; free some space and run the same command again"
        ):
            swept(config, out)
    assert len(swept(config, out).points) == 4
    assert points_in(out) == [f"lambda={value}" for value in LAMBDAS]


# --- what is refused


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (
            {"sweep": {"lamda": [1]}},
            {},
            "sweep.lamda: 'lamda' is not a parameter of method 'task_arithmetic' (did you mean 'lambda'?)",
        ),
        ({"sweep": {"density": [1]}}, {}, "'density' is not a parameter of method 'task_arithmetic'"),
        ({"sweep": {"lambda": [1, "x"]}}, {}, "sweep.lambda: 'x' is not a number"),
        ({"sweep": {"drop_rate": [0.5, 1.5]}}, {}, "sweep.drop_rate: 1.5 is outside the range [0, 1]"),
        ({"sweep": None}, {}, "no key 'sweep', so there is one merge: run `streammerge merge`"),
        (
            {},
            {"keep": "best"},
            "--keep best keeps the points with the best scores: give a command with --score",
        ),
        ({}, {"keep": 0, "score": "echo {}"}, "--keep '0': give all, best, or a whole number of 1 or more"),
        ({}, {"score_timeout": 5}, "--score-timeout goes with --score"),
        (
            {},
            {"score": "echo {}", "score_timeout": 0},
            "--score-timeout '0': give a number of seconds above 0",
        ),
        ({}, {"score": "echo 1"}, "write {} where it goes"),
        ({}, {"memory": 1 << 20}, "is too little"),
    ],
)
def test_bad_requests_are_refused_before_the_first_byte(
    change: dict[str, Any], options: dict[str, Any], words: str, config: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        swept({**config, **change}, tmp_path / "out", **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_directory_with_anything_else_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"contains files that no sweep wrote \(notes.txt\)"):
        swept(config, out, overwrite=True)
    with pytest.raises(OutputError, match="no sweep wrote"):
        swept(config, Path(config["base_model"]))
    assert (out / "notes.txt").read_text() == "mine"


def test_a_different_sweep_is_refused_and_more_values_are_added(
    config: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    swept(config, out, score=BY_LAMBDA)
    with pytest.raises(OutputError, match="holds a sweep with a different seed: choose a different OUT"):
        swept(config, out, seed=3)
    with pytest.raises(OutputError, match="holds scores of a different command"):
        swept(config, out, score="echo 1 {}")
    with pytest.raises(OutputError, match=r"holds the point lambda=0\.1, which the config does not have"):
        swept({**config, "sweep": {"lambda": [0.2, 0.3]}}, out)
    more = swept({**config, "sweep": {"lambda": [*LAMBDAS, 0.9]}}, out, score=BY_LAMBDA)
    assert more.bytes_written == len(output_bytes(out / "lambda=0.9")["model.safetensors"]) - _header(out)
    assert list(more.points) == [*(f"lambda={value}" for value in LAMBDAS), "lambda=0.9"]
    replaced = swept({**config, "sweep": {"lambda": [0.7]}}, out, overwrite=True)
    assert points_in(out) == ["lambda=0.7"] == list(replaced.points)


def _header(out: Path) -> int:
    data = output_bytes(out / "lambda=0.9")["model.safetensors"]
    return 8 + int.from_bytes(data[:8], "little")


@pytest.mark.parametrize(
    "change",
    [
        lambda value: [],
        lambda value: value["points"].pop("lambda=0.1") and {**value, "format": 9},
        lambda value: {**value, "points": {"../x": value["points"]["lambda=0.1"]}},
        lambda value: {**value, "points": {"lambda=0.1": {"values": 3}}},
        lambda value: {**value, "command": 5},
    ],
)
def test_a_damaged_record_is_refused(change: Any, config: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    swept({**config, "sweep": {"lambda": [0.1]}}, out)
    record = json.loads((out / sweep_record.RECORD).read_text())
    (out / sweep_record.RECORD).write_text(json.dumps(change(record)))
    with pytest.raises(OutputError, match="is not the record of a sweep"):
        swept({**config, "sweep": {"lambda": [0.1]}}, out)


def test_a_point_that_overflows_is_named_and_the_others_are_merged(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models(2, shapes=SHAPES, dtype=torch.float16)
    config = config_for("task_arithmetic", paths, sweep={"lambda": [0.5, 1e9, 0.7, 1e8]})
    events: list[Event] = []
    result = swept(config, tmp_path / "out", score="echo 3; : {}", on_event=events.append)
    assert result.failed == ("lambda=1000000000.0", "lambda=100000000.0")
    assert points_in(tmp_path / "out") == ["lambda=0.5", "lambda=0.7"]
    rows = rows_of(tmp_path / "out")
    assert [row["score"] for row in rows] == ["3.0", "", "3.0", ""]
    assert re.match(
        r"tensor .* overflow F16 at element \d+ \[\d+, \d+\]: use smaller weights", rows[1]["reason"]
    )
    assert [event.values["score"] for event in events if event.kind == "point"] == [None, None, 3, 3]
    for name in ("lambda=0.5", "lambda=0.7"):
        merge(tmp_path / "out" / name / CONFIG_COPY, tmp_path / name, on_event=lambda event: None)
        assert output_bytes(tmp_path / "out" / name) == output_bytes(tmp_path / name)
    events.clear()
    tolerant = swept(config, tmp_path / "out", score="echo 3; : {}", nonfinite="warn", on_event=events.append)
    assert not tolerant.failed
    warned = [event.values["message"] for event in events if event.kind == "warning"]
    assert {line.partition(": tensor ")[0] for line in warned if "overflow" in line} == set(result.failed)
    assert [row["reason"] for row in rows_of(tmp_path / "out")] == [""] * 4


def test_infinity_in_an_input_ends_a_sweep_since_no_point_can_be_merged(
    make_models: Callable[..., list[Path]], tmp_path: Path
) -> None:
    paths = make_models(2, shapes=SHAPES, dtype=torch.float16)
    tensors = read_tensors(paths[1])
    tensors[next(iter(SHAPES))].view(-1)[0] = torch.inf
    write_model(paths[1], tensors)
    with pytest.raises(ModelError, match=r"holds NaN or infinity at element 0 \[0, 0\]: repair the model"):
        swept(config_for("task_arithmetic", paths, sweep={"lambda": [0.5, 0.7]}), tmp_path / "out")


def test_the_python_api_refuses_a_sweep_given_to_merge(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `streammerge sweep CONFIG OUT`"):
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
