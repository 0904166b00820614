"""A merge of quantised models is, bit for bit, the merge of the same values written out in fp32, whatever takes part."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from streammerge import merge
from streammerge.api import compute_fisher, compute_grams
from tests.checkpoint.adapters.scene import factors, write_adapter
from tests.checkpoint.quantized import real_models as real
from tests.checkpoint.quantized.formats import write, write_out
from tests.checkpoint.tokenizers.scene import words, write_tokenizer
from tests.conftest import read_tensors
from tests.estimate.network.tiny import make_lines, write_lines

ROWS, COLUMNS = 64, 96
MODULES = tuple(f"model.layers.{i}.{part}" for i in (0, 1) for part in ("mlp.down_proj", "self_attn.q_proj"))
STORED = (
    "fp8 blocks F32",
    "nvfp4",
    "gptq by index",
    "awq",
    "nf4",
    "int-quantized asymmetric",
    "pack-quantized g_idx",
)
Config = Mapping[str, Any]


BOTH = ("stored", "written")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model in each format, ``stored/0`` on, and their values in fp32, ``written/0`` on."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(STORED):
        values = write(tmp_path / "stored" / f"{i}", name, i, ROWS, COLUMNS, MODULES, num_hidden_layers=2)
        write_out(tmp_path / "written" / f"{i}", values, num_hidden_layers=2)
    return tmp_path


def same(config: Config) -> dict[str, torch.Tensor]:
    """Merge by a config in both folders; the outputs have the same bits."""
    outs = []
    for folder in BOTH:
        with contextlib.chdir(folder):
            merge(dict(config), "merged")
        outs.append(read_tensors(Path(folder, "merged")))
    found, want = outs
    assert found.keys() == want.keys()
    for name in want:
        assert found[name].dtype == want[name].dtype
        assert torch.equal(found[name].view(torch.uint8), want[name].view(torch.uint8)), name
    return found


def models(*numbers: int, **more: Any) -> list[dict[str, Any]]:
    # Random words follow a model's contents, or its alias where it has one.
    return [
        {"model": f"{i}", "alias": f"model {i}", "parameters": {"weight": 0.3 + 0.1 * i}, **more}
        for i in numbers
    ]


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "slerp", "model_stock"])
def test_formats_merge_with_each_other(method: str, here: Path, small_capacity: Any) -> None:
    small_capacity(4 << 20, 2)
    some = models(*(range(1, len(STORED)) if method != "slerp" else (1,)))
    if method in ("slerp", "model_stock"):
        some = [{"model": one["model"]} for one in some]  # These take no weights.
    base = {} if method == "linear" else {"base_model": "0"}
    parameters = {"t": 0.4} if method == "slerp" else {"density": 0.6} if "ties" in method else {}
    same({"merge_method": method, "models": some, **base, "parameters": parameters, "dtype": "float32"})


def test_an_adapter_goes_on_quantised_weights(here: Path) -> None:
    for i in range(len(STORED)):
        parts = {**factors(MODULES[0], COLUMNS, ROWS, 4, i), **factors(MODULES[3], COLUMNS, ROWS, 4, 9 + i)}
        write_adapter(here / f"adapter-{i}", parts, r=4, lora_alpha=1)
    some = [{"model": f"{i}+../adapter-{i}", "parameters": {"weight": 0.2}} for i in range(len(STORED))]
    same({"merge_method": "linear", "models": some, "dtype": "float32"})


def test_slices_are_taken_of_models_in_different_formats(here: Path) -> None:
    def part(*numbers: int, layer: int) -> dict[str, Any]:
        return {"sources": [{"model": f"{i}", "layer_range": [layer, layer + 1]} for i in numbers]}

    slices = [part(2, 3, layer=0), part(1, 4, layer=1), part(5, 6, layer=0)]
    whole = {"merge_method": "linear", "parameters": {"weight": 0.5}, "dtype": "bfloat16"}
    assert "model.layers.2.mlp.down_proj.weight" in same({**whole, "slices": slices})


def test_vocabularies_are_aligned_with_embeddings_that_are_quantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stored = (("int-quantized channel", "abcdefgh"), ("fp8 blocks BF16", "hgfeXYZ"))
    for i, (name, texts) in enumerate(stored):
        n, modules = len(texts), ("model.embed_tokens", "lm_head")
        settings = {"vocab_size": n, "tie_word_embeddings": False}
        values = write(tmp_path / "stored" / f"{i}", name, i, n, COLUMNS, modules, **settings)
        write_out(tmp_path / "written" / f"{i}", values, **settings)
        for folder in BOTH:
            write_tokenizer(tmp_path / folder / f"{i}", words(texts))
    whole = {"merge_method": "linear", "models": models(0, 1), "dtype": "float32"}
    found = same({**whole, "tokenizer": {"source": "union"}})
    assert len(found["model.embed_tokens.weight"]) == 11


def test_diagonals_weigh_quantised_models(here: Path) -> None:
    rng = np.random.default_rng(3)
    for i in (1, 2, 3):
        diagonal = {f"{module}.weight": rng.uniform(0, 1e-3, (ROWS, COLUMNS)) for module in MODULES}
        write_out(here / f"fisher-{i}", {**diagonal, "model.norm.weight": rng.uniform(0, 1, 24)})
    some = [{"model": f"{i}", "fisher": f"../fisher-{i}/model.safetensors"} for i in (1, 2, 3)]
    same({"merge_method": "fisher", "models": some, "dtype": "float32"})


def test_estimates_of_a_quantised_model_are_those_of_its_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    torch.set_num_threads(1)
    source = real.write_float(tmp_path / "float", "qwen3", 1)
    real.compressed(source, tmp_path / "quantised", "pack-quantized")
    real.from_compressed(tmp_path / "quantised", tmp_path / "written")
    data = write_lines(tmp_path / "data.jsonl", make_lines(3))
    for name in ("quantised", "written"):
        compute_fisher(str(tmp_path / name), data, tmp_path / f"{name}-fisher.zarr", labels="empirical")
        compute_grams(str(tmp_path / name), data, tmp_path / f"{name}-gram.zarr")
    for kind in ("fisher", "gram"):
        found, want = (
            zarr.open_group(str(tmp_path / f"{name}-{kind}.zarr"), mode="r")
            for name in ("quantised", "written")
        )
        assert set(found.array_keys()) == set(want.array_keys()) != set()
        for key in want.array_keys():
            assert np.array_equal(found[key][...], want[key][...]), key
