"""Mixtures load in the libraries that read them, and hold what the config says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import streammerge
from streammerge.planning.moe.families import FAMILIES
from streammerge.testing.models import output_bytes
from tests.planning.moe.conftest import Dense
from tests.planning.moe.dense import HIDDEN, INTERMEDIATE, LAYERS, TOKENS, load, logits_of, write_dense

TARGETS = [
    ("llama", "mixtral", 0),
    ("mistral", "mixtral", 0),
    ("qwen2", "qwen2_moe", 1),
    ("llama", "qwen2_moe", 1),
    ("qwen3", "qwen3_moe", 0),
    ("llama", "deepseek", 0),
    ("mistral", "deepseek", 1),
]
"""The type of the base, of the mixture, and the number of shared experts."""
_CHOSEN = {("llama", "qwen2_moe"): "qwen2", ("llama", "deepseek"): "DeepSeek"}
"""The `architecture` where it is not the default."""


def config_of(
    dense: Dense, family: str, target: str, shared: int, experts: list[int], **top: Any
) -> dict[str, Any]:
    """Return a config with random gates; a shared expert adds nothing."""
    config = {
        "base_model": dense(family, 0),
        "gate_mode": "random",
        "experts": [{"source_model": dense(family, i)} for i in experts],
        **top,
    }
    if shared:
        config["shared_experts"] = [{"source_model": dense(family, 0), "residual_scale": 0.0}]
    if (family, target) in _CHOSEN:
        config["architecture"] = _CHOSEN[family, target]
    return config


@pytest.mark.filterwarnings("ignore:all experts are the same model")
@pytest.mark.parametrize(("family", "target", "shared"), TARGETS)
def test_a_mixture_of_one_model_computes_what_the_model_computes(
    dense: Dense, tmp_path: Path, family: str, target: str, shared: int
) -> None:
    config = config_of(dense, family, target, shared, [0, 0, 0])
    streammerge.merge(config, tmp_path / "out", progress=False)
    model = load(tmp_path / "out")
    assert model.config.architectures[0].lower().startswith(target.replace("_", ""))
    expected = logits_of(transformers.AutoModelForCausalLM.from_pretrained(dense(family, 0)))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    written = model.generate(TOKENS, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert torch.equal(written[:, TOKENS.shape[1]], expected[:, -1].argmax(-1))


@pytest.mark.filterwarnings("ignore:all experts are the same model")
def test_a_head_tied_to_the_embedding_stays_tied(tmp_path: Path) -> None:
    write_dense(tmp_path / "base", "qwen3", 0, tie_word_embeddings=True)
    config = {
        "base_model": tmp_path / "base",
        "gate_mode": "random",
        "experts": [{"source_model": tmp_path / "base"}] * 2,
    }
    streammerge.merge(config, tmp_path / "out", progress=False)
    expected = logits_of(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    torch.testing.assert_close(logits_of(load(tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# A mixture of experts\n" in card
    assert "each token is routed to 2 of 2 experts" in card


@pytest.mark.parametrize(
    ("family", "target", "shared"), [t for t in TARGETS if t[1] != "deepseek" and t[0] != "mistral"]
)
def test_both_names_of_experts_give_one_model(
    dense: Dense, tmp_path: Path, family: str, target: str, shared: int
) -> None:
    config = config_of(dense, family, target, shared, [1, 2, 3])
    logits = []
    for names in ("classic", "fused"):
        streammerge.merge({**config, "expert_names": names}, tmp_path / names, progress=False)
        model = load(tmp_path / names)
        logits.append(logits_of(model))
        if names == "fused":
            assert model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False).shape[1] >= 4
    assert torch.equal(*logits)
    shape = load_file(tmp_path / "fused" / "model.safetensors")[
        "model.layers.0.mlp.experts.gate_up_proj"
    ].shape
    assert shape == (3, 2 * INTERMEDIATE, HIDDEN)


def test_experts_are_copied_byte_for_byte_and_the_rest_is_the_base(dense: Dense, tmp_path: Path) -> None:
    streammerge.merge(config_of(dense, "llama", "mixtral", 0, [1, 2]), tmp_path / "out", progress=False)
    out = load_file(tmp_path / "out" / "model.safetensors")
    base, *experts = (load_file(dense("llama", i) / "model.safetensors") for i in range(3))
    expected = {name: tensor for name, tensor in base.items() if ".mlp." not in name}
    for layer in range(LAYERS):
        for number, expert in enumerate(experts):
            for part, called in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{number}.{called}.weight"
                expected[name] = expert[f"model.layers.{layer}.mlp.{part}_proj.weight"]
    gates = {name for name in out if name.endswith("block_sparse_moe.gate.weight")}
    assert out.keys() == expected.keys() | gates
    assert len(gates) == LAYERS
    assert all(torch.equal(out[name], tensor) for name, tensor in expected.items())


def test_experts_may_have_more_features_than_the_base(dense: Dense, tmp_path: Path) -> None:
    models = [write_dense(tmp_path / str(i), "llama", i, intermediate_size=56) for i in range(2)]
    config = config_of(dense, "llama", "mixtral", 0, [1, 2])
    config["experts"] = [{"source_model": model} for model in models]
    streammerge.merge(config, tmp_path / "out", progress=False)
    assert load(tmp_path / "out").config.intermediate_size == 56


def test_random_gates_depend_on_the_seed_alone(dense: Dense, tmp_path: Path) -> None:
    def gates_of(name: str, mode: str, **options: Any) -> torch.Tensor:
        config = config_of(dense, "qwen3", "qwen3_moe", 0, [1, 2, 3, 0], gate_mode=mode)
        streammerge.merge(config, tmp_path / name, progress=False, **options)
        found = load_file(tmp_path / name / "model.safetensors")
        return torch.stack([found[f"model.layers.{layer}.mlp.gate.weight"] for layer in range(LAYERS)])

    normal, again, other = (gates_of(f"normal{i}", "random", seed=seed) for i, seed in enumerate((7, 7, 8)))
    assert torch.equal(normal, again)
    assert not torch.equal(normal, other)
    assert abs(normal.mean()) < 0.2
    assert 0.85 < normal.std() < 1.15
    uniform = gates_of("uniform", "uniform_random")
    limit = HIDDEN**-0.5
    assert 0.9 * limit < uniform.abs().max() <= limit
    assert len(torch.cat([normal, uniform]).unique()) == 2 * normal.numel()


def test_noise_and_factor_change_an_expert_as_documented(dense: Dense, tmp_path: Path) -> None:
    config = config_of(dense, "llama", "mixtral", 0, [1, 1])
    config["experts"][1] |= {"noise_scale": 0.5, "residual_scale": -2.0}
    for names in ("classic", "fused"):
        streammerge.merge({**config, "expert_names": names}, tmp_path / names, progress=False)
    out, fused = (load_file(tmp_path / names / "model.safetensors") for names in ("classic", "fused"))
    noise = []
    for part, called in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        prefix = "model.layers.1.block_sparse_moe.experts"
        plain, changed = (out[f"{prefix}.{i}.{called}.weight"].double() for i in range(2))
        noise.append((changed / (-2.0 if part == "down" else 1.0) - plain).flatten())
    drawn = torch.cat(noise).numpy()
    assert abs(drawn.mean()) < 0.03
    assert abs(drawn.std() - 0.5) < 0.03
    assert len(np.unique(drawn)) > 0.99 * drawn.size  # each tensor has numbers of its own
    assert torch.equal(fused["model.layers.1.mlp.experts.down_proj"][1], out[f"{prefix}.1.w2.weight"])


def test_bits_depend_neither_on_memory_nor_on_threads_nor_on_interruptions(
    dense: Dense, tmp_path: Path, small_capacity: Any
) -> None:
    config = config_of(dense, "llama", "mixtral", 0, [1, 2], dtype="bfloat16", expert_names="fused")
    config["experts"][0]["noise_scale"] = 0.1
    streammerge.merge(config, tmp_path / "whole", progress=False)
    small_capacity(40 << 20, 1)
    stop = streammerge.api.merging.threading.Event()

    def stop_early(event: streammerge.Event) -> None:
        if event.kind == "progress":
            stop.set()

    with pytest.raises(streammerge.Stopped):
        streammerge.merge(config, tmp_path / "parts", on_event=stop_early, stop=stop)
    streammerge.merge(config, tmp_path / "parts", progress=False)
    assert output_bytes(tmp_path / "parts") == output_bytes(tmp_path / "whole")
    verdict = streammerge.verify(tmp_path / "parts", against=config, progress=False)
    assert not verdict.problems


@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_of_a_dense_architecture_are_those_of_transformers(family: str) -> None:
    found = transformers.AutoConfig.for_model(family).to_dict()
    found |= found.pop("rope_parameters")
    mine = FAMILIES[family].completed({"num_attention_heads": found["num_attention_heads"]})
    differing = {key for key in mine if key in found and mine[key] != found[key]} - {"sliding_window"}
    assert not differing
    target = {"qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}.get(family, "mixtral")
    other = transformers.AutoConfig.for_model(target).to_dict()
    other |= other.pop("rope_parameters")
    lost = {key for key in found.keys() & other.keys() - mine.keys() if found[key] != other[key]}
    assert lost <= {
        "model_type", "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
        "layer_types", "head_dim", "sliding_window", "num_key_value_heads",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:config.json. quantization_config is left out")
def test_quantised_models_are_decoded_to_the_dtype_that_they_had(tmp_path: Path) -> None:
    write_dense(tmp_path / "base", "llama", 0, torch.bfloat16, hidden_size=128, intermediate_size=128)
    one = {"merge_method": "passthrough", "models": [tmp_path / "base"]}
    streammerge.merge({**one, "quantize": "fp8"}, tmp_path / "fp8", progress=False)
    streammerge.merge({**one, "models": [tmp_path / "fp8"]}, tmp_path / "plain", progress=False)
    experts = [{"source_model": tmp_path / "fp8", "noise_scale": noise} for noise in (0, 0.1)]
    config = {"base_model": tmp_path / "fp8", "gate_mode": "random", "experts": experts}
    streammerge.merge(config, tmp_path / "out", progress=False)
    out, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert {tensor.dtype for tensor in out.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(out["model.layers.0.block_sparse_moe.experts.0.w3.weight"], plain[name])
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(out[name], plain[name])
