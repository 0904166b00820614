"""Averages of checkpoints: the plain float64 sum, of the right checkpoints, each read once or not at all."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge
from streammerge.config import config_from_mapping, parse_config
from streammerge.config.schedules import parse_schedule
from streammerge.errors import StreammergeError
from streammerge.planning.averages import settle_checkpoints
from tests.cli.running import Cli, assert_refused
from tests.conftest import as_float64, read_tensors, write_model

SHAPES = {"layers.0.weight": (24, 40), "norm": (40,)}


def write_run(directory: Path, n: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> list[Path]:
    """Write checkpoints of a run as the Trainer does; return them, oldest first."""
    generator = torch.Generator().manual_seed(n)
    paths = []
    for i in range(n):
        tensors = {
            name: torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)])
            for name, shape in SHAPES.items()
        }
        paths.append(write_model(directory / f"checkpoint-{(i + 1) * 50}", tensors))
        (paths[-1] / "optimizer.pt").write_bytes(b"not to be opened")
    return paths


def average_of(paths: list[Path], coefficients: tuple[float, ...]) -> dict[str, np.ndarray]:
    """Return the float64 sum of models, rounded to float32."""
    models = [as_float64(path) for path in paths]
    sums = {
        name: sum(c * model[name] for c, model in zip(coefficients, models, strict=True)) for name in SHAPES
    }
    return {name: np.asarray(values, np.float32) for name, values in sums.items()}


@pytest.mark.parametrize("schedule", ["sma", "wma", "ema:0.7", "wsm:linear", "wsm:sqrt", "wsm:cosine"])
def test_an_average_is_the_sum_in_float64(schedule: str, tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", 5)
    asked = {"directory": tmp_path / "run", "last": 4, "schedule": schedule}
    streammerge.merge(
        {"merge_method": "linear", "checkpoints": asked}, tmp_path / "out", memory="1GiB", on_event=print
    )
    expected = average_of(paths[1:], parse_schedule(schedule, "").coefficients(4))
    for name, values in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(values.numpy(), expected[name])


def test_the_dtype_is_the_one_that_all_checkpoints_promote_to_and_dtype_another(
    tmp_path: Path, cli: Cli
) -> None:
    paths = write_run(tmp_path / "run", 3, (torch.bfloat16, torch.float16))
    assert cli("average", tmp_path / "run", tmp_path / "out", "--memory", "1GiB", "--quiet").code == 0
    assert cli("average", tmp_path / "run", tmp_path / "half", "--dtype", "bf16", "--quiet").code == 0
    expected = average_of(paths, (1 / 3, 1 / 3, 1 / 3))
    for name, values in read_tensors(tmp_path / "out").items():
        assert values.dtype == torch.float32
        np.testing.assert_array_equal(values.numpy(), expected[name])
    assert {t.dtype for t in read_tensors(tmp_path / "half").values()} == {torch.bfloat16}


def test_a_checkpoint_without_a_share_is_not_read_and_the_plan_says_so(tmp_path: Path, cli: Cli) -> None:
    paths = write_run(tmp_path / "run", 4)
    (paths[3] / "model.safetensors").write_bytes(b"no model at all")
    arguments = ("average", tmp_path / "run", tmp_path / "out", "--schedule", "wsm:cosine")
    text = cli(*arguments, "--plan").out
    assert not (tmp_path / "out").exists()
    lines = [
        line.split()[:2] for line in text.splitlines() if "checkpoint-" in line and "warning" not in line
    ]
    assert lines == [[f"{c:g}", str(p)] for c, p in zip((0.25, 0.5, 0.25, 0), paths, strict=True)]
    assert f"{paths[3]} (not read)" in text
    done = cli(*arguments)
    assert done.code == 0, done.err
    assert "coefficient of 0" in done.err
    expected = average_of(paths[:3], (0.25, 0.5, 0.25))
    for name, values in read_tensors(tmp_path / "out").items():
        np.testing.assert_array_equal(values.numpy(), expected[name])


def test_the_config_in_an_output_gives_the_same_average_and_verifies_it(tmp_path: Path, cli: Cli) -> None:
    write_run(tmp_path / "run", 3)
    out = tmp_path / "out"
    assert cli("average", tmp_path / "run", out, "--schedule", "ema:0.5", "--quiet").code == 0
    again = tmp_path / "again"
    assert cli("merge", out / "streammerge_config.yml", again, "--quiet").code == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert cli("verify", out, "--against", out / "streammerge_config.yml", "--all").code == 0
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert cli("average", tmp_path / "run", out, "--schedule", "ema:0.5", "--quiet").code == 0  # finished
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_models_anywhere_single_files_among_them_are_averaged_in_the_order_given(
    tmp_path: Path, cli: Cli
) -> None:
    first, second = write_run(tmp_path / "run", 2)
    file = tmp_path / "third.safetensors"
    save_file(read_tensors(first), file)
    done = cli("average", second, file, first, tmp_path / "out", "--schedule", "wma", "--quiet")
    assert done.code == 0, done.err
    expected = average_of([second, first, first], parse_schedule("wma", "").coefficients(3))
    for name, values in read_tensors(tmp_path / "out").items():
        np.testing.assert_array_equal(values.numpy(), expected[name])


def test_single_files_in_a_directory_are_averaged(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for i in range(9, 12):
        torch.save({"state_dict": {"w": torch.full((4,), float(i))}}, tmp_path / "run" / f"epoch={i}.ckpt")
    config = {"merge_method": "linear", "checkpoints": {"directory": tmp_path / "run", "last": 2}}
    streammerge.merge(config, tmp_path / "out", memory="1GiB", on_event=lambda event: None)
    assert read_tensors(tmp_path / "out")["w"].tolist() == [10.5] * 4


@pytest.fixture
def few_open_files() -> Iterator[None]:
    """Allow 256 open files, in addition to those that other tests have left open in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 256 + len(os.listdir("/proc/self/fd"))
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard)
    )
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_hundred_checkpoints_take_few_open_files_and_little_memory(
    few_open_files: None, tmp_path: Path, small_capacity: Callable[[int, int], None]
) -> None:
    small_capacity(1 << 20, 2)
    paths = write_run(tmp_path / "run", 100)
    streammerge.merge(
        {"merge_method": "linear", "checkpoints": {"directory": tmp_path / "run", "schedule": "wma"}},
        tmp_path / "out",
        on_event=lambda event: None,
    )
    expected = average_of(paths, parse_schedule("wma", "").coefficients(100))
    for name, values in read_tensors(tmp_path / "out").items():
        np.testing.assert_array_equal(values.numpy(), expected[name])


@pytest.mark.parametrize(
    ("places", "more", "words"),
    [
        (["nowhere"], (), "nowhere: no such directory of checkpoints"),
        (["empty"], (), "empty: no checkpoints in it: name the directory that holds them"),
        (["run/checkpoint-50"], (), "a model, with no checkpoints in it"),
        (["run"], ("--pattern", "step-*"), "no checkpoints in it whose names look like 'step-*'"),
        (["run"], ("--last", "4"), "4, but there are 3 checkpoints in run"),
        (["run", "nowhere"], (), "nowhere: no such directory"),
        (["run"], ("--schedule", "emma"), "did you mean 'ema'?"),
        (["lora"], (), "a LoRA adapter, not a model"),
    ],
)
def test_what_cannot_be_averaged_is_refused_in_one_line(
    places: list[str],
    more: tuple[str, ...],
    words: str,
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"), 3)
    Path("empty").mkdir()
    Path("lora/checkpoint-1").mkdir(parents=True)
    Path("lora/checkpoint-1/adapter_config.json").write_text("{}")
    assert_refused(cli("average", *places, "out", *more), words)
    assert not Path("out").exists()


def test_a_final_model_next_to_the_checkpoints_is_named_and_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    write_model(tmp_path, {name: torch.full(shape, 9.0) for name, shape in SHAPES.items()})
    config = settle_checkpoints(parse_config(f"merge_method: linear\ncheckpoints: {{directory: {tmp_path}}}"))
    assert [Path(spec.reference).name for spec in config.models] == ["checkpoint-50", "checkpoint-100"]
    assert "the model in it is not averaged" in config.notes[0]
    both = {"directory": [tmp_path, tmp_path / "checkpoint-50"]}
    soup = settle_checkpoints(config_from_mapping({"merge_method": "linear", "checkpoints": both}))
    assert [spec.reference for spec in soup.models] == [str(tmp_path), str(tmp_path / "checkpoint-50")]
    assert "taken as one model; the 2 checkpoints in it are not" in soup.notes[0]


def test_a_checkpoint_that_is_named_twice_counts_twice(tmp_path: Path) -> None:
    first, second = write_run(tmp_path, 2)
    config = {"merge_method": "linear", "checkpoints": {"directory": [first, first, second]}}
    streammerge.merge(config, tmp_path / "out", memory="1GiB", on_event=lambda event: None)
    expected = average_of([first, first, second], (1 / 3, 1 / 3, 1 / 3))
    np.testing.assert_array_equal(read_tensors(tmp_path / "out")["norm"].numpy(), expected["norm"])


def test_a_run_that_went_on_is_noticed_when_an_average_is_continued(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 3)
    config = {"merge_method": "linear", "checkpoints": {"directory": tmp_path / "run"}}
    streammerge.merge(config, tmp_path / "out", memory="1GiB", on_event=lambda event: None)
    write_run(tmp_path / "run", 4)
    with pytest.raises(StreammergeError, match="overwrite"):
        streammerge.merge(config, tmp_path / "out", memory="1GiB", on_event=lambda event: None)


def test_the_checkpoints_of_a_trainer_are_averaged(tmp_path: Path, cli: Cli) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **sizes))
    tokens = {key: torch.arange(8) for key in ("input_ids", "labels")}
    how = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "steps"}
    arguments = transformers.TrainingArguments(str(tmp_path / "run"), max_steps=11, save_steps=3, **how)
    trainer = transformers.Trainer(model, arguments, train_dataset=[tokens] * 8)
    trainer.train()
    trainer.save_model()
    done = cli("average", tmp_path / "run", tmp_path / "out", "--schedule", "wma", "--quiet")
    assert done.code == 0, done.err
    paths = [tmp_path / "run" / f"checkpoint-{step}" for step in (3, 6, 9, 11)]  # not by text
    models = [as_float64(path) for path in paths]
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name in models[0]:
        expected = sum(c * one[name] for c, one in zip((0.1, 0.2, 0.3, 0.4), models, strict=True))
        np.testing.assert_array_equal(merged[name].numpy(), np.asarray(expected, np.float32))
