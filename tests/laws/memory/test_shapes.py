"""Many models, many tensors, few files that may be open, many merges: none takes more than it may."""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from streammerge.algebra.block import Block, Operand
from streammerge.api import merge
from streammerge.engine import streaming
from streammerge.engine import task as chunk
from streammerge.engine.answers import sample_of
from streammerge.engine.worker import Worker
from streammerge.errors import InputError
from streammerge.machine import share_out
from streammerge.numerics.ordered_sum import OrderedSum
from streammerge.numerics.philox import RandomKeys
from streammerge.planning.memory import allocate
from streammerge.statistics import ties
from streammerge.statistics.base import Reducer
from tests.conftest import config_for, output_bytes, use_capacity, write_models
from tests.laws.memory.test_peak import peak_of
from tests.patience import PATIENCE

PROOFS = Path(__file__).parents[3] / "tools" / "prove"
sys.path.insert(0, str(PROOFS))

from soak import MIB, Sample, leaks  # noqa: E402
from worst_models import Family, make_family  # noqa: E402
from worst_shapes import Case, Outcome, Usage  # noqa: E402

STREAMMERGE = [sys.executable, "-m", "streammerge.cli"]


def merge_command(directory: Path, config: dict[str, Any], memory: str) -> list[str]:
    (directory / "config.yml").write_text(yaml.safe_dump(config))
    arguments = [str(directory / "config.yml"), str(directory / "out"), "--memory", memory]
    return [*STREAMMERGE, "merge", *arguments, "--quiet", "--device", "cpu"]


# --- many models


@pytest.fixture(scope="module")
def sixty_four(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and 64 models of 3.2 MB; eight have files of their own, the others are links to these."""
    directory = tmp_path_factory.mktemp("many")
    made = make_family(directory, Family((("w", (1600, 1000)), ("norm", (64,))), 8))
    links = [directory / f"link{i}" for i in range(56)]
    for i, link in enumerate(links):
        link.symlink_to(made[1 + i % 8])
    return [*made, *links]


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["320MiB", "700MiB"], ids=["streamed", "held"])
def test_64_models_have_their_ranks_counted_below_the_limit(
    memory: str, sixty_four: list[Path], tmp_path: Path
) -> None:
    """Two windows of counts of each model's, of 4 MiB, would take 512 MiB."""
    config = config_for("breadcrumbs", sixty_four, parameters={"density": 0.5})
    config["models"] = [{**model, "alias": str(i)} for i, model in enumerate(config["models"])]
    peak = peak_of(merge_command(tmp_path, config, memory))
    assert 50 * MIB < peak < int(memory[:3]) * MIB


def test_a_sample_of_many_models_is_small() -> None:
    n, k = 1 << 19, 64
    buffer = np.zeros((k + 1) * n * 2, np.uint8)
    operands = [Operand(2 * n * i, "BF16") for i in range(k + 1)]
    keys = RandomKeys(0, tuple(map(str, range(k))))
    loaded = Block(buffer, tuple(operands[1:]), operands[0], "t", 0, n, (n,), keys)
    for model in (None, 5):
        sample = sample_of(loaded, model)
        assert sample.buffer.size <= 4 * MIB
        assert sample.n >= 4 * 4096
    assert sample_of(loaded, 5).n > sample_of(loaded, None).n


# --- statistics in little room


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("breadcrumbs", {"density": 0.5, "ties": "index"}),
        ("ties", {"density": 0.2, "trim_scope": "model", "ties": "index"}),
        ("dare_ties", {"density": 0.5, "rescale": "l1"}),
        ("karcher", {}),
        ("sce", {"select_topk": 0.5}),
    ],
)
@pytest.mark.parametrize("capacity", [1 << 18, 1 << 24], ids=["streamed", "held"])
def test_bits_do_not_depend_on_the_room_for_statistics(
    capacity: int, method: str, parameters: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_models(tmp_path, shapes={"w": (64, 900), "b": (70,)})
    config = config_for(method, paths, parameters=parameters)
    use_capacity(monkeypatch, capacity, 2)
    merge(config, tmp_path / "large", device="cpu")
    monkeypatch.setattr(
        allocate, "statistics_memory", lambda *arguments: allocate.StatisticsMemory(bins=300, elements=4096)
    )
    monkeypatch.setattr(ties, "_MOST_RUNS", 2)
    merge(config, tmp_path / "little", device="cpu")
    assert output_bytes(tmp_path / "little") == output_bytes(tmp_path / "large")


def test_partial_sums_are_folded_in_order_whatever_order_they_come_in() -> None:
    random_values = np.random.default_rng(0)
    lengths = {3: 5 * 4096, 7: 100, 8: 3 * 4096 + 5}
    pieces, parts = [], []
    for tensor, n in lengths.items():
        for start in range(0, n, 4096 * 2):
            size = min(n, start + 4096 * 2) - start
            partials = random_values.standard_normal((-(-size // 4096), 3)) * 1e8 ** random_values.random()
            pieces.append((tensor, start, size, partials))
            parts.append(partials)
    expected = np.cumsum(np.concatenate(parts), axis=0)[-1].tolist()
    for seed in range(20):
        sums = OrderedSum(list(lengths.items()))
        for piece in random.Random(seed).sample(pieces, len(pieces)):
            sums.add(*piece)
        assert sums.totals == expected


def test_few_pieces_wait_for_a_slow_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums wait for those of the piece before them: others may not run ahead of it without end."""
    waiting = []
    add, add_piece = OrderedSum.add, streaming.Streamer._add_piece

    def slow_add_piece(
        self: streaming.Streamer, piece: streaming.Piece, some: Sequence[Reducer[Any]]
    ) -> None:
        until = time.monotonic() + PATIENCE
        while piece.start == 0 and not any(waiting) and time.monotonic() < until:
            time.sleep(0.3)  # and the others run on, as far as they may
        add_piece(self, piece, some)

    def noting_add(self: OrderedSum, *piece: Any) -> None:
        add(self, *piece)
        waiting.append(len(self._early))

    monkeypatch.setattr(streaming.Streamer, "_add_piece", slow_add_piece)
    monkeypatch.setattr(OrderedSum, "add", noting_add)
    use_capacity(monkeypatch, 1 << 18, 2)
    paths = write_models(tmp_path, shapes={"w": (400, 1024)})
    merge(config_for("karcher", paths), tmp_path / "out", device="cpu")
    assert len(waiting) > 40
    assert 0 < max(waiting) <= 2 * (2 + 3)


def test_answers_are_forgotten_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk has thousands of small tensors; the dot products of 64 models take 66 KB each."""
    known = []
    merge_piece = chunk._merge_piece

    def noting(worker: Worker, *arguments: Any) -> Any:
        known.append(len(worker.answers))
        return merge_piece(worker, *arguments)

    monkeypatch.setattr(chunk, "_merge_piece", noting)
    paths = write_models(tmp_path, shapes={f"w{i}": (8,) for i in range(300)})
    merge(config_for("karcher", paths), tmp_path / "out", device="cpu", threads=2)
    assert len(known) == 300
    assert max(known) <= 2 + 3


# --- files that may be open


def run_with_files(command: Sequence[str], files: int) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and 64 models, of four files each."""
    directory = tmp_path_factory.mktemp("shards")
    paths = [directory / f"m{i}" for i in range(65)]
    for seed, path in enumerate(paths):
        path.mkdir()
        for shard in range(4):
            values = np.full((8, 32), np.float16(seed + shard))
            save_file({f"w{shard}": values}, path / f"model-{shard + 1:05d}-of-00004.safetensors")
        (path / "config.json").write_text('{"model_type": "llama"}')
    return paths


@pytest.mark.slow
def test_64_models_in_many_files_are_merged_where_256_may_be_open(
    many_shards: list[Path], tmp_path: Path
) -> None:
    done = run_with_files(merge_command(tmp_path, config_for("ties", many_shards), "512MiB"), 256)
    assert (done.returncode, done.stderr) == (0, "")


def test_more_shards_than_may_be_open_are_refused_in_one_line_before_anything_is_written(
    many_shards: list[Path], tmp_path: Path
) -> None:
    command = merge_command(tmp_path, config_for("linear", many_shards[:3]), "512MiB")
    done = run_with_files([*command, "--shard-size", "512", "--threads", "1"], 64)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "raise it with `ulimit -n 80`" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run_with_files([*command, "--shard-size", "512", "--threads", "1"], 80)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_may_be_open_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = 256

    def limits(what: int) -> tuple[int, int]:
        return allowed, allowed

    monkeypatch.setattr(resource, "getrlimit", limits)
    for n_shards in (1, 20, 70):
        most = share_out(n_shards, 7)
        assert 7 <= most <= 128
        assert 2 * (most + n_shards + 7) + 40 <= allowed
    with pytest.raises(InputError, match="the limit is 256"):
        share_out(100, 7)
    allowed = resource.RLIM_INFINITY
    assert share_out(100_000, 7) == 128


# --- many merges


def test_merges_in_a_row_leak_nothing() -> None:
    """Few of them, so that memory is still settling; the tool itself makes 200 and allows 2 MiB."""
    command = [sys.executable, PROOFS / "soak.py", "--merges", "20", "--allowed", "8MiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "descriptors: " in done.stdout


def test_the_soak_sees_what_grows() -> None:
    steady = [Sample(200 * MIB + 1000 * (i % 7), 6, 2, 0) for i in range(200)]
    assert not leaks(steady)
    for i, name in enumerate(("resident", "descriptors", "threads", "temporaries")):
        grown = [list(vars(sample).values()) for sample in steady]
        for number, values in enumerate(grown):
            values[i] += number * (32_000 if name == "resident" else 1)
        found = leaks([Sample(*values) for values in grown])
        assert len(found) == 1
        assert found[0].startswith(name)


def test_a_peak_above_the_budget_is_told_from_one_that_holds() -> None:
    def outcome(code: int, peak: int, said: str = "", asked: str = "") -> Outcome:
        return Outcome(Case("row", "linear"), "320MiB", Usage(code, 1, 1, 1, peak * MIB, 0), said, asked)

    refusal = "x: give at least 400 MiB, or"
    assert not outcome(0, 320).problem
    assert outcome(0, 321).problem == "above the budget"
    assert not outcome(2, 90, refusal).problem
    assert outcome(2, 90, refusal).refused == "400 MiB"
    assert outcome(2, 90, refusal, "320MiB").problem == "refused with what a refusal asked for"
    assert outcome(1, 90, refusal).problem.startswith("failed")
