"""PEFT loads what is written, and its merge is the fine-tuned model; see also tools/compare/compare_adapters_out.py."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from streammerge.api import merge
from streammerge.config.lora import extraction

TEXT: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 16,
}
VIT = {**TEXT, "image_size": 8, "patch_size": 4}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "linear, with biases": ("AutoModelForCausalLM", "llama", {**TEXT, "attention_bias": True}, {}),
    "embeddings": ("AutoModelForCausalLM", "llama", TEXT, {"embeddings": True}),
    "a tied head": ("AutoModelForCausalLM", "llama", {**TEXT, "tie_word_embeddings": True}, {}),
    "Conv1D": (
        "AutoModelForCausalLM",
        "gpt2",
        {"vocab_size": 48, "n_embd": 16, "n_layer": 1, "n_head": 2},
        {},
    ),
    "a convolution": ("AutoModelForImageClassification", "vit", VIT, {}),
    "experts": ("AutoModelForCausalLM", "mixtral", {**TEXT, "num_local_experts": 2}, {}),
    "experts in one tensor": (
        "AutoModelForCausalLM",
        "gpt_oss",
        {**TEXT, "intermediate_size": 16, "num_local_experts": 3, "num_experts_per_tok": 2},
        {},
    ),
    "fused experts": (
        "AutoModelForCausalLM",
        "qwen3_moe",
        {**TEXT, "moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2},
        {},
    ),
    "a rank by module": ("AutoModelForCausalLM", "llama", TEXT, {"rank": None, "energy": 1.0}),
}


def save(model: Any, path: Path, *, fused: bool) -> None:
    """Save a model, its experts as the modules hold them if `fused`; else as transformers spells them in files."""
    model.save_pretrained(path)
    if fused:
        save_file(model.state_dict(), path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")
def test_peft_merges_the_adapter_to_the_fine_tuned_model(name: str, tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel

    auto, kind, settings, asked = CASES[name]
    torch.manual_seed(1)
    model = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(kind, **settings))
    save(model, tmp_path / "base", fused="fused" in name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if not key.endswith(("cls_token", "position_embeddings", "sinks")):
                parameter += torch.randn_like(parameter) * 0.02
    save(model, tmp_path / "tuned", fused="fused" in name)
    wanted: dict[str, Any] = {"rank": 48, "energy": None, "dtype": None, **asked}
    merge(
        extraction(str(tmp_path / "tuned"), str(tmp_path / "base"), **wanted),
        tmp_path / "out",
        progress=False,
    )
    base = getattr(transformers, auto).from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = PeftModel.from_pretrained(base, tmp_path / "out")
    merged = adapted.merge_and_unload().state_dict()
    for key, tensor in model.state_dict().items():
        scale = torch.finfo(torch.float32).eps * tensor.abs().max()
        assert (merged[key] - tensor).abs().max() <= 8 * scale, key
