"""Adapters that are written: the best of their rank, the same bits however they come about, and nothing torn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import streammerge.engine.task as task
import streammerge.output.adapter as finishing
from streammerge.api import extract_lora, merge, verify
from streammerge.cli.entry import cli
from streammerge.config.lora import extraction
from streammerge.errors import InputError, ModelError, OutputError, StreammergeWarning, WorldError
from streammerge.testing.models import output_bytes, write_model, write_models
from tests.conftest import use_capacity

SHAPES = {
    "model.embed_tokens.weight": (70, 24),
    "model.layers.0.self_attn.q_proj.weight": (40, 40),
    "model.layers.0.self_attn.q_proj.bias": (40,),
    "model.layers.0.mlp.up_proj.weight": (90, 40),
    "model.layers.0.mlp.down_proj.weight": (40, 90),
    "model.layers.0.input_layernorm.weight": (24,),
    "model.norm.weight": (24,),
    "conv.weight": (12, 3, 2, 2),
}
FACTORED = [name for name, shape in SHAPES.items() if len(shape) > 1 and "embed" not in name]


def extracted(paths: list[Path], **asked: Any) -> dict[str, Any]:
    wanted: dict[str, Any] = {"rank": None, "energy": None, "dtype": None, **asked}
    return extraction(str(paths[1]), str(paths[0]), **wanted)


def changes(paths: list[Path]) -> dict[str, np.ndarray[Any, Any]]:
    base, tuned = (load_file(path / "model.safetensors") for path in paths[:2])
    return {name: (tuned[name].double() - base[name].double()).flatten(1).numpy() for name in FACTORED}


def product(adapter: dict[str, torch.Tensor], name: str) -> np.ndarray[Any, Any]:
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    a, b = (adapter[f"{stem}.lora_{part}.weight"].double().flatten(1).numpy() for part in "AB")
    return b @ a


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_models(tmp_path_factory.mktemp("models"), 2, shapes=SHAPES)


@pytest.fixture(scope="module")
def adapter(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapters") / "adapter"
    summary = extract_lora(models[1], out, base=models[0], rank=5, progress=False)
    assert {one.module for one in summary.residuals} == {name.removesuffix(".weight") for name in FACTORED}
    return out


def test_no_factors_of_the_rank_are_nearer_and_the_residual_is_recorded(
    models: list[Path], adapter: Path
) -> None:
    found = load_file(adapter / "adapter_model.safetensors")
    recorded = json.loads((adapter / "streammerge.json").read_text())["adapter"]["modules"]
    for name, change in changes(models).items():
        tail = np.linalg.norm(np.linalg.svd(change, compute_uv=False)[5:])
        missed = np.linalg.norm(change - product(found, name))
        assert missed == pytest.approx(tail, rel=1e-6)
        told = recorded[name.removesuffix(".weight")]
        assert told["rank"] == 5
        assert told["residual"] == pytest.approx(missed / np.linalg.norm(change), rel=1e-12)
    assert verify(adapter).problems == ()
    assert not [path for path in adapter.iterdir() if path.name == "model.safetensors"]


def test_what_is_not_decomposed_is_stored_whole(models: list[Path], adapter: Path) -> None:
    found, tuned = (
        load_file(adapter / "adapter_model.safetensors"),
        load_file(models[1] / "model.safetensors"),
    )
    whole = {name for name in SHAPES if name not in FACTORED}
    spelt = {
        name: name.replace("q_proj.bias", "q_proj.base_layer.bias") if name.endswith("bias") else name
        for name in whole
    }
    for name in whole:
        assert torch.equal(found[f"base_model.model.{spelt[name]}"], tuned[name]), name
    assert len(found) == 2 * len(FACTORED) + len(whole)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["bias"] == "lora_only"
    assert config["modules_to_save"] == ["embed_tokens", "input_layernorm", "norm"]
    assert config["target_modules"] == ["conv", "down_proj", "q_proj", "up_proj"]


def test_energy_chooses_the_least_rank_that_suffices(models: list[Path], tmp_path: Path) -> None:
    merge(extracted(models, energy=0.6, max_rank=14, drop_rest=True), tmp_path / "out", progress=False)
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert len(found) == 2 * len(FACTORED)
    for name, change in changes(models).items():
        values = np.linalg.svd(change, compute_uv=False) ** 2
        wanted = min(14, int(np.argmax(np.cumsum(values) >= 0.6 * values.sum())) + 1)
        module = name.removesuffix(".weight")
        assert config["rank_pattern"].get(module, config["r"]) == wanted
        assert config["alpha_pattern"].get(module, config["lora_alpha"]) == wanted
        assert found[f"base_model.model.{module}.lora_A.weight"].shape[0] == wanted


def test_the_bits_depend_neither_on_memory_nor_on_threads(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streammerge.algebra.low_rank._BLOCK", 40 * 16)  # blocks of 16 rows
    outs = []
    for capacity, threads in ((3 << 20, 1), (40 << 20, 3)):
        use_capacity(monkeypatch, capacity, threads)
        outs.append(tmp_path / f"out{threads}")
        merge(extracted(models, rank=5), outs[-1], progress=False)
    assert output_bytes(outs[0]) == output_bytes(outs[1])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Count the factorisations; the third fails."""
    names: list[str] = []
    compute = task.factors_of

    def once(worker: Any, job: Any, buffer: Any) -> Any:
        names.append(job.name)
        if len(names) == 3:
            raise WorldError("the power fails")
        return compute(worker, job, buffer)

    monkeypatch.setattr(task, "factors_of", once)
    return iter([names])


def test_an_interrupted_extraction_computes_only_what_is_missing(
    models: list[Path], adapter: Path, tmp_path: Path, counted: Iterator[list[str]]
) -> None:
    names, out = next(counted), tmp_path / "out"
    with pytest.raises(WorldError):
        merge(extracted(models, rank=5), out, threads=1, progress=False)
    assert not (out / "adapter_config.json").exists()
    assert not (out / "adapter_model.safetensors").exists()
    merge(extracted(models, rank=5), out, progress=False)
    assert output_bytes(out) == output_bytes(adapter)
    assert sorted(set(names)) == sorted(FACTORED)
    assert len(names) <= 2 * len(FACTORED) - 1


@pytest.mark.parametrize("last", ["adapter_config.json", "streammerge_config.yml"])
def test_an_end_that_fails_is_taken_up_again(
    models: list[Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    write: Callable[..., None] = finishing.write_file

    def failing(path: Path, data: bytes, *more: Any) -> None:
        if path.name == last:
            raise WorldError("the power fails")
        write(path, data, *more)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(finishing, "write_file", failing)
        with pytest.raises(WorldError):
            merge(extracted(models, rank=5), out, progress=False)
    assert not (out / "adapter_config.json").exists()
    merge(extracted(models, rank=5), out, progress=False)
    assert output_bytes(out) == output_bytes(adapter)
    assert merge(extracted(models, rank=5), out, progress=False).already_complete


def test_only_the_last_of_several_documents_may_write_an_adapter(models: list[Path], tmp_path: Path) -> None:
    base, tuned, other = map(str, models)
    stage = f"merge_method: linear\nname: mean\nmodels: [{{model: {tuned}}}, {{model: {other}}}]\n"
    last = f"merge_method: passthrough\nmodels: [{{model: mean}}]\noutput: {{kind: lora, base: {base}}}\nrank: 4\n"
    merge(f"{stage}---\n{last}", tmp_path / "out", progress=False)
    assert (tmp_path / "out/adapter_config.json").exists()
    with pytest.raises(InputError, match="only the last document"):
        merge(f"{stage}output: {{kind: lora, base: {base}}}\n---\n{last}", tmp_path / "no", progress=False)


def test_an_adapter_is_not_shared_by_processes(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave the option out"):
        merge(extracted(models, rank=5), tmp_path / "out", join=True, progress=False)
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_factors_leaves_nothing_behind(models: list[Path], tmp_path: Path) -> None:
    same, out = shutil.copytree(models[0], tmp_path / "same"), tmp_path / "out"
    with pytest.raises(ModelError, match="no matrix differs"):
        merge(extracted([models[0], same], rank=5), out, progress=False)
    assert not out.exists() or not any(out.iterdir())
    merge(extracted(models, rank=5), out, progress=False)


def test_a_rank_that_is_too_low_for_the_energy_is_told(models: list[Path], tmp_path: Path) -> None:
    config = extracted(models, energy=0.99, max_rank=2)
    with pytest.warns(
        StreammergeWarning, match=r"less than 0.99 of their squared norm at rank 2 .*: raise max_rank"
    ):
        merge(config, tmp_path / "out", progress=False)


def test_an_exclude_that_finds_nothing_is_told(models: list[Path], tmp_path: Path) -> None:
    with pytest.warns(StreammergeWarning, match="exclude: 'typo' finds no module"):
        merge(extracted(models, rank=5, exclude="typo"), tmp_path / "out", progress=False)


def test_another_extraction_needs_overwrite(models: list[Path], adapter: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(adapter, tmp_path / "adapter")
    with pytest.raises(OutputError, match="choose a different OUT"):
        merge(extracted(models, rank=4), adapter, progress=False)
    merge(extracted(models, rank=4), adapter, overwrite=True, progress=False)
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4


def test_a_merge_becomes_an_adapter_of_its_values_before_they_are_rounded(
    models: list[Path], tmp_path: Path
) -> None:
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(models[0]),
        "models": [{"model": str(path), "parameters": {"weight": 0.3}} for path in models[1:]],
    }
    merge({**config, "output": "lora", "rank": 40, "dtype": "float64"}, tmp_path / "adapter", progress=False)
    found = load_file(tmp_path / "adapter/adapter_model.safetensors")
    base, *tuned = (load_file(path / "model.safetensors") for path in models)
    for name in FACTORED:
        deltas = [(one[name].float() - base[name].float()).double() for one in tuned]
        wanted = (0.3 * deltas[0] + 0.3 * deltas[1]).flatten(1).numpy()
        distance = np.linalg.norm(product(found, name) - wanted) / np.linalg.norm(wanted)
        assert distance < 1e-12, name


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"quantize": "fp8"}, "leave `quantize` out"),
        ({"energy": 0.9}, "'rank' and 'energy'"),
        ({"rank": 0}, "from 1 to"),
        ({"output": "loha"}, "is not lora"),
        (
            {"output": {"kind": "lora", "base": "{base}", "modules_to_save": ["typo"]}},
            "no module is called typo",
        ),
        ({"output": {"kind": "lora", "bse": "x"}}, "did you mean 'base'"),
        ({"output": {"kind": "lora"}}, "set `base_model`"),
        ({"output": {"kind": "lora", "base": "{base}", "include": "nothing"}}, "'nothing' finds no module"),
        ({"output": {"kind": "lora", "base": "{base}", "exclude": "."}}, "no matrix is left"),
        ({"output": None}, "goes with `output: lora`"),
    ],
)
def test_what_makes_no_adapter_is_refused(models: list[Path], tmp_path: Path, change: Any, what: str) -> None:
    text = json.dumps({**extracted(models, rank=5), **change}).replace("{base}", str(models[0]))
    with pytest.raises(InputError, match=what):
        merge(json.loads(text), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_cut_into_shards(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"one file, which PEFT does not read in shards"):
        merge(extracted(models, rank=5), tmp_path / "out", shard_size="1GB", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [None, (90, 41)])
def test_another_models_base_is_refused(
    models: list[Path], tmp_path: Path, shape: tuple[int, int] | None
) -> None:
    tensors = load_file(models[0] / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    del tensors[name]
    other = write_model(
        tmp_path / "other", tensors if shape is None else {**tensors, name: torch.zeros(shape)}
    )
    with pytest.raises(
        InputError, match=r"up_proj\.weight is (missing|\[90, 41\]) there, \[90, 40\] in the result"
    ):
        merge(extracted([other, models[1]], rank=5), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["the same place", "a copy"])
def test_models_without_a_difference_make_no_adapter(models: list[Path], tmp_path: Path, where: str) -> None:
    twin = models[0]
    if where == "a copy":
        twin = tmp_path / "twin"
        shutil.copytree(models[0], twin)
    with pytest.raises(InputError, match="no matrix differs"):
        merge(extracted([models[0], twin], rank=5), tmp_path / "out", progress=False)
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_the_command_writes_what_the_function_does(models: list[Path], adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "by command"
    line = ["extract-lora", str(models[1]), str(out), "--base", str(models[0]), "--rank", "5"]
    done = CliRunner().invoke(cli, line)
    assert done.exit_code == 0, done.output
    assert output_bytes(out) == output_bytes(adapter)
    assert "model.layers.0.mlp.up_proj    " in done.output
    assert CliRunner().invoke(cli, [*line, "--energy", "0.5"]).exit_code == 2
    assert "LoRA of rank 5" in CliRunner().invoke(cli, [*line, "--plan"]).output
