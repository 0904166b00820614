"""Merges of every kind into a quantised output: methods, slices, adapters, vocabularies, models that are stored differently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from safetensors.torch import save_file

from streammerge import merge, verify
from streammerge.errors import ConfigError, ModelError
from tests.checkpoint.quantized.formats import write
from tests.checkpoint.tokenizers.scene import words, write_tokenizer
from tests.conftest import config_for, output_bytes, use_capacity, write_models
from tests.laws.quantised.rules import fp8, integers, raw_tensors

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (256, 64),
    "model.layers.0.mlp.up_proj.weight": (256, 128),
    "model.layers.1.mlp.up_proj.weight": (256, 128),
}
RULE = fp8("F32", (128, 128))
ENDS = (".weight", ".weight_scale_inv")
METHODS = ["dare_ties", "della", "regmean", "fisher", "karcher"]
"""Cut anywhere, drawing at random, ranked by rows, solved by columns, with diagonals, and as a formula of whole tensors."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_models(tmp_path_factory.mktemp("models"), 2, shapes=SHAPES)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_rounded_by_the_rule(
    method: str, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(method, paths, dtype="float32")
    merge(config, tmp_path / "floats", progress=False)
    merge({**config, "quantize": "fp8"}, tmp_path / "fp8", progress=False)
    floats, found = (
        load_file(tmp_path / "floats/model.safetensors"),
        raw_tensors(tmp_path / "fp8/model.safetensors"),
    )
    for module in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"):
        for end, data in RULE(floats[f"{module}.weight"], *ENDS).items():
            assert found[module + end].data == data, (module, end)
    if method not in ("regmean", "karcher"):  # these hold more than that of a tensor
        use_capacity(monkeypatch, 700_000, 2)
        merge({**config, "quantize": "fp8"}, tmp_path / "small", progress=False)
        assert output_bytes(tmp_path / "small") == output_bytes(tmp_path / "fp8")


def write_fp8(path: Path, seed: int, n_layers: int, **config: Any) -> Path:
    """Write a model in FP8 with a factor of its keys, one scale for each block of 32 x 32."""
    g = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(8, 64, generator=g).bfloat16()}
    for i in range(n_layers):
        tensors[f"model.layers.{i}.k_proj.weight"] = torch.randn(64, 64, generator=g).to(torch.float8_e4m3fn)
        tensors[f"model.layers.{i}.k_proj.weight_scale_inv"] = torch.rand(2, 2, generator=g) + 0.5
        tensors[f"model.layers.{i}.k_proj.k_scale"] = torch.tensor(0.5 + i)
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    declared = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32], **config}
    text = {"model_type": "llama", "num_hidden_layers": n_layers, "quantization_config": declared}
    (path / "config.json").write_text(json.dumps(text))
    return path


def test_layers_that_are_put_in_a_new_order_are_copied_code_by_code(tmp_path: Path) -> None:
    a, b = write_fp8(tmp_path / "a", 0, 2), write_fp8(tmp_path / "b", 1, 2)
    slices = [
        {"sources": [{"model": str(a), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(b), "layer_range": [1, 2]}]},
    ]
    merge(
        {"merge_method": "passthrough", "slices": slices, "quantize": "same"},
        tmp_path / "out",
        progress=False,
    )
    found, own, other = (raw_tensors(path / "model.safetensors") for path in (tmp_path / "out", a, b))
    for end in (".weight", ".weight_scale_inv", ".k_scale"):
        assert found[f"model.layers.1.k_proj{end}"] == own[f"model.layers.1.k_proj{end}"]
        assert found[f"model.layers.2.k_proj{end}"] == other[f"model.layers.1.k_proj{end}"]
    settings = json.loads((tmp_path / "out/config.json").read_text())
    assert settings["num_hidden_layers"] == 3
    assert settings["quantization_config"]["quant_method"] == "fp8"


def test_a_layer_that_is_stored_otherwise_than_config_json_says_is_refused(tmp_path: Path) -> None:
    a, b = write_fp8(tmp_path / "a", 0, 2), write_fp8(tmp_path / "b", 1, 2, scale_fmt="ue8m0")
    slices = [{"sources": [{"model": str(path), "layer_range": [0, 1]}]} for path in (a, b)]
    with pytest.raises(ModelError, match=r"is stored otherwise than .*a declares: set `quantize: none`"):
        merge(
            {"merge_method": "passthrough", "slices": slices, "quantize": "same"},
            tmp_path / "out",
            progress=False,
        )


def test_an_adapter_upon_a_quantised_model_is_encoded_anew(tmp_path: Path) -> None:
    base = write_fp8(tmp_path / "a", 0, 1)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    g = torch.Generator().manual_seed(2)
    prefix = "base_model.model.model.layers.0.k_proj"
    factors = {
        f"{prefix}.lora_A.weight": torch.randn(2, 64, generator=g),
        f"{prefix}.lora_B.weight": torch.randn(64, 2, generator=g),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["k_proj"]})
    )
    config = {"merge_method": "passthrough", "models": [f"{base}+{adapter}"]}
    merge({**config, "quantize": "same"}, tmp_path / "same", progress=False)
    merge({**config, "dtype": "float32"}, tmp_path / "floats", progress=False)
    floats, found = (
        load_file(tmp_path / "floats/model.safetensors"),
        raw_tensors(tmp_path / "same/model.safetensors"),
    )
    values = floats["model.layers.0.k_proj.weight"]
    for end, data in fp8("F32", (32, 32))(values, *ENDS).items():
        assert found[f"model.layers.0.k_proj{end}"].data == data
    assert (
        found["model.layers.0.k_proj.weight"].data
        != raw_tensors(base / "model.safetensors")["model.layers.0.k_proj.weight"].data
    )


def test_a_quantised_model_and_one_that_is_not_merge_into_either_form(tmp_path: Path) -> None:
    coded = write_fp8(tmp_path / "a", 0, 1)
    merge(
        {"merge_method": "passthrough", "models": [str(coded)], "dtype": "float32"},
        tmp_path / "b",
        progress=False,
    )
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in (coded, tmp_path / "b")]
    merge({"merge_method": "linear", "models": models, "quantize": "same"}, tmp_path / "same", progress=False)
    merge({"merge_method": "linear", "models": models}, tmp_path / "none", progress=False)
    kept, plain = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("same", "none"))
    assert "quantization_config" in kept
    assert "quantization_config" not in plain
    # The mean of a tensor and itself is that tensor, which FP8 holds up to the rounding of its scales.
    values = load_file(tmp_path / "b/model.safetensors")["model.layers.0.k_proj.weight"]
    merge(
        {"merge_method": "passthrough", "models": [str(tmp_path / "same")], "dtype": "float32"},
        tmp_path / "c",
        progress=False,
    )
    again = load_file(tmp_path / "c/model.safetensors")["model.layers.0.k_proj.weight"]
    assert np.abs(again - values).max() <= np.abs(values).max() / 16


@pytest.mark.parametrize("quantize", ["same", "fp8"])
def test_a_stage_is_not_quantised_even_where_its_codes_are_copied(
    quantize: str, paths: list[Path], tmp_path: Path
) -> None:
    coded = write_fp8(tmp_path / "a", 0, 1) if quantize == "same" else paths[1]
    stage = {"name": "one", "merge_method": "passthrough", "models": [str(coded)], "quantize": quantize}
    last = {"merge_method": "linear", "models": [{"model": "one", "parameters": {"weight": 1.0}}]}
    with pytest.raises(ConfigError, match="a stage is not stored: quantise the output"):
        merge(yaml.safe_dump_all([stage, last], sort_keys=False), tmp_path / "out", progress=False)
    last["quantize"] = quantize
    if quantize == "fp8":
        merge(yaml.safe_dump_all([{**stage, "quantize": "none"}, last]), tmp_path / "out", progress=False)
        assert f"model.layers.0.mlp.up_proj{ENDS[1]}" in raw_tensors(tmp_path / "out/model.safetensors")


def write_vocabulary(folder: Path, name: str, seed: int, texts: str, modules: tuple[str, ...]) -> Path:
    """Write a model in a format, its vocabulary in the order of the texts."""
    settings = {"vocab_size": len(texts), "tie_word_embeddings": False, "num_hidden_layers": 1}
    g = np.random.default_rng(seed)
    rows = {} if "lm_head" in modules else {"model.embed_tokens.weight": g.standard_normal((len(texts), 64))}
    write(folder, name, seed, len(texts) if not rows else 64, 64, modules, rows, **settings)
    write_tokenizer(folder, words(texts))
    return folder


@pytest.mark.parametrize("quantize", ["same", "fp8"])
def test_a_vocabulary_is_aligned_and_the_layers_are_quantised(quantize: str, tmp_path: Path) -> None:
    """The rows of the vocabulary are floats, in the order of the union; layers have the codes of the merge in fp32."""
    layers = ("model.layers.0.mlp.down_proj",)
    if quantize == "same":
        paths = [
            write_vocabulary(tmp_path / text, "fp8 blocks F32", i, text, layers)
            for i, text in enumerate(("abcdefgh", "hgfeXYZ"))
        ]
        rule = fp8("F32", (32, 32))
    else:
        paths, rule = [], RULE
        for i, text in enumerate(("abcdefgh", "hgfeXYZ")):
            shapes = {"model.embed_tokens.weight": (len(text), 128), f"{layers[0]}.weight": (128, 256)}
            (path,) = write_models(tmp_path / text, 0, shapes=shapes, seed=i)
            settings = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps({**settings, "vocab_size": len(text)}))
            write_tokenizer(path, words(text))
            paths.append(path)
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in paths]
    whole = {"merge_method": "linear", "models": models, "tokenizer": {"source": "union"}}
    merge({**whole, "dtype": "float32"}, tmp_path / "floats", progress=False)
    merge({**whole, "dtype": "float32", "quantize": quantize}, tmp_path / "coded", progress=False)
    floats, found = (raw_tensors(tmp_path / name / "model.safetensors") for name in ("floats", "coded"))
    embedding = "model.embed_tokens.weight"
    assert found[embedding] == floats[embedding]
    assert found[embedding].shape[0] == 11
    values = load_file(tmp_path / "floats/model.safetensors")[f"{layers[0]}.weight"]
    for end, data in rule(values, *ENDS).items():
        assert found[layers[0] + end].data == data
    settings = json.loads((tmp_path / "coded/config.json").read_text())
    assert settings["vocab_size"] == 11
    assert settings["quantization_config"]["quant_method"] == "fp8"
    assert not verify(str(tmp_path / "coded")).problems


def test_rows_of_a_quantised_vocabulary_are_encoded_anew_or_refused(tmp_path: Path) -> None:
    name, modules = "int-quantized channel", ("model.embed_tokens", "lm_head")
    paths = [
        write_vocabulary(tmp_path / text, name, i, text, modules) for i, text in enumerate(("abcd", "dcbXa"))
    ]
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in paths]
    whole = {"merge_method": "linear", "models": models, "quantize": "same"}
    with pytest.raises(ModelError, match=r"embed_tokens\.weight has another shape in the output"):
        merge({**whole, "tokenizer": {"source": "union"}}, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    of_first = {"tokenizer": {"source": {"model": str(paths[0])}}}
    merge({**whole, **of_first}, tmp_path / "coded", progress=False)
    merge({**whole, **of_first, "quantize": "none", "dtype": "float32"}, tmp_path / "floats", progress=False)
    floats = load_file(tmp_path / "floats/model.safetensors")
    found = raw_tensors(tmp_path / "coded/model.safetensors")
    for module in modules:
        rule = integers(8, "BF16", (1, 64), packed=False)
        for end, data in rule(floats[f"{module}.weight"], ".weight", ".weight_scale").items():
            assert found[module + end].data == data, (module, end)
