"""What is written in FP8 is what transformers makes of it: a real model, loaded, has our values bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from streammerge import merge

transformers = pytest.importorskip("transformers")


@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_the_values_that_codes_and_scales_stand_for(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        num_experts=2,
        num_experts_per_tok=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=128,
        tie_word_embeddings=True,
    )
    paths = [tmp_path / "a", tmp_path / "b"]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in paths]
    settings = {"merge_method": "linear", "models": models, "dtype": "bfloat16", "quantize": "fp8"}
    merge(settings, tmp_path / "fp8", progress=False)
    copy = {"merge_method": "passthrough", "models": [str(tmp_path / "fp8")], "dtype": "float32"}
    merge(copy, tmp_path / "floats", progress=False)

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)
    found, want = loaded.state_dict(), load_file(tmp_path / "floats/model.safetensors")
    layer = "model.layers.0.mlp.experts"
    for i in range(2):
        halves = [want.pop(f"{layer}.{i}.{half}_proj.weight") for half in ("gate", "up")]
        want[f"{layer}.{i}"] = torch.cat(halves)
        found[f"{layer}.{i}"] = found[f"{layer}.gate_up_proj"][i]
        found[f"{layer}.{i}.down_proj.weight"] = found[f"{layer}.down_proj"][i]
    assert all(torch.equal(found[name], values) for name, values in want.items())
    assert sum("experts" in name for name in want) == 4
