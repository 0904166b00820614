"""Compare models with LoRA adapters, merged as they are read, with what PEFT's `merge_and_unload` makes of them.

    python tools/compare/compare_peft.py [NAME …]

Needs `peft` (and `accelerate`) beside what the tests need. Each case trains nothing: an adapter of random numbers is put on
a small random model, saved as PEFT saves it, and merged here by `passthrough` of ``base+adapter`` in float32. Every
parameter must be PEFT's own to a few float32 roundings, which its matrix product does in another order. Where an adapter
acts on a tied embedding or head, PEFT's merge writes into the weight that both share; there (LOGITS) the logits of the
model under its adapter, before any merge, are compared instead.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from streammerge.api import merge
from streammerge.errors import StreammergeError

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
CAUSAL, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
VISION, SEQ2SEQ = "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM"
LLAMA = (CAUSAL, "llama", TEXT)
ATTENTION = ["q_proj", "v_proj"]

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8}
TIED = (CAUSAL, "llama", {**TEXT, "tie_word_embeddings": True})
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
QWEN_TOWER = {
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 4,
    "hidden_size": 32,
    "patch_size": 4,
    "in_channels": 3,
    "mlp_ratio": 2,
    "spatial_merge_size": 1,
}
QWEN3_TOWER = {
    **VIT,
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "spatial_merge_size": 1,
    "temporal_patch_size": 2,
    "head_dim": 8,
}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1, "moe_layers": [0, 1]},
    "deepseek_v3": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 0, "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    },
}  # fmt: skip

CASES: dict[str, tuple[tuple[str, str, dict[str, Any]], dict[str, Any]]] = {
    "lora": (LLAMA, {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}),
    "lora on every linear layer": (LLAMA, {"r": 16, "lora_alpha": 8, "target_modules": "all-linear"}),
    "rank 1": (LLAMA, {"r": 1, "lora_alpha": 3, "target_modules": ATTENTION}),
    "rsLoRA": (LLAMA, {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "use_rslora": True}),
    "DoRA": (LLAMA, {"r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, "down_proj"], "use_dora": True}),
    "rsLoRA and DoRA": (LLAMA, {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "use_rslora": True, "use_dora": True}),
    "ranks and alphas by module": (LLAMA, {
        "r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "rank_pattern": {"layers.1.self_attn.q_proj": 7, "v_proj": 2},
        "alpha_pattern": {r"^model.layers.0.self_attn.q_proj": 5, "v_proj": 1},
    }),
    "modules_to_save": (LLAMA, {
        "r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens", "norm"],
    }),
    "an embedding": (LLAMA, {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"]}),
    "a head": (LLAMA, {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head"]}),
    "some layers": (LLAMA, {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "layers_to_transform": [1]}),
    "Conv1D": ((CAUSAL, "gpt2", GPT2), {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D with DoRA": ((CAUSAL, "gpt2", GPT2), {
        "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True,
    }),
    "biases": ((CAUSAL, "gpt2", GPT2), {
        "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all",
    }),
    "lora_bias": ((CAUSAL, "opt", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}), {
        "r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "lora_bias": True,
    }),
    "a classifier": ((CLASSIFIER, "bert", TEXT), {
        "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "task_type": "SEQ_CLS",
    }),
    "a convolution": (("AutoModelForImageClassification", "vit", VIT), {
        "r": 4, "lora_alpha": 8, "target_modules": ["projection"], "modules_to_save": ["classifier"],
    }),
    "a convolution with DoRA": (("AutoModelForImageClassification", "vit", VIT), {
        "r": 4, "lora_alpha": 8, "target_modules": ["projection"], "use_dora": True,
    }),
    "experts": ((CAUSAL, "mixtral", {**TEXT, "num_local_experts": 4}), {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}),
    "DoRA on an embedding": (LLAMA, {**LORA, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "Qwen2-VL": ((VISION, "qwen2_vl", {"text_config": {**TEXT, **MROPE}, "vision_config": QWEN_TOWER}), {
        **LORA, "target_modules": [*ATTENTION, "qkv", "mlp.0"]}),
    "Qwen3-VL": ((VISION, "qwen3_vl", {"text_config": {**TEXT, **MROPE}, "vision_config": QWEN3_TOWER}), {
        **LORA, "target_modules": [*ATTENTION, "qkv", "linear_fc1"]}),
    "Gemma 3": ((VISION, "gemma3", {"text_config": {**TEXT, "sliding_window_pattern": 3}, "vision_config": VIT,
                                    "mm_tokens_per_image": 4, "image_token_index": 95}), {**LORA, "target_modules": ATTENTION}),
    "LLaVA": ((VISION, "llava", {"text_config": {"model_type": "llama", **TEXT}, "vision_config": {"model_type": "clip_vision_model", **VIT},
                                 "image_token_index": 95}), {**LORA, "target_modules": [*ATTENTION, "linear_1"]}),
    "T5": ((SEQ2SEQ, "t5", {**TEXT, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}), {
        **LORA, "target_modules": ["q", "v", "wo"]}),
    "ViT": (("AutoModelForImageClassification", "vit", VIT), {**LORA, "target_modules": "all-linear"}),
    "Mamba": ((CAUSAL, "mamba", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}), {
        **LORA, "target_modules": ["in_proj", "x_proj"]}),
    "GPT-NeoX": ((CAUSAL, "gpt_neox", {**TEXT, "num_key_value_heads": None}), {**LORA, "target_modules": ["query_key_value", "embed_out", "lm_head"]}),
    **{f"experts of {kind}": ((CAUSAL, kind, {**TEXT, **settings}), {
        **LORA, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "lora_dropout": 0.0,
    }) for kind, settings in MOE.items()},
    "experts down alone": ((CAUSAL, "mixtral", {**TEXT, **MOE["mixtral"]}), {
        **LORA, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
    "experts with ranks by parameter": ((CAUSAL, "mixtral", {**TEXT, **MOE["mixtral"]}), {
        **LORA, "target_modules": [], "target_parameters": ["mlp.experts.down_proj", "experts.gate_up_proj"], "use_rslora": True,
        "rank_pattern": {"experts.down_proj": 3}, "alpha_pattern": {".*gate_up_proj": 3}}),
    "biases of experts": ((CAUSAL, "gpt_oss", {**TEXT, **MOE["gpt_oss"]}), {
        **LORA, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "experts.gate_up_proj_bias"]}),
    "a router and experts": ((CAUSAL, "mixtral", {**TEXT, **MOE["mixtral"]}), {
        **LORA, "target_modules": [], "target_parameters": ["mlp.gate.weight", "experts.gate_up_proj"]}),
    "a parameter that is a weight": (LLAMA, {**LORA, "target_modules": [], "target_parameters": ["q_proj.weight"]}),
    "trained tokens": (LLAMA, {**LORA, "target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [90, 3, 91]}}),
    "trained tokens of the embedding": (LLAMA, {**LORA, "target_modules": ATTENTION, "trainable_token_indices": [5, 1]}),
    "trained tokens of the head too": (LLAMA, {
        **LORA, "target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [7]}}),
    "trained tokens of a tied model": (TIED, {**LORA, "target_modules": ATTENTION, "trainable_token_indices": [5, 1]}),
    "trained tokens, tied by name": (TIED, {
        **LORA, "target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [5, 1]}}),
    "trained tokens that differ under a tied head": (TIED, {
        **LORA, "target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [7]}}),
    "trained tokens of a language model within another": ((VISION, "gemma3", {
        "text_config": {**TEXT, "sliding_window_pattern": 3}, "vision_config": VIT, "mm_tokens_per_image": 4, "image_token_index": 95}), {
        **LORA, "target_modules": ATTENTION, "trainable_token_indices": [5, 1]}),
    "a tied head": (TIED, {**LORA, "target_modules": ["lm_head"]}),
    "a tied embedding": (TIED, {**LORA, "target_modules": ["embed_tokens"]}),
    "a tied head and its embedding": (TIED, {**LORA, "target_modules": ["embed_tokens", "lm_head"]}),
    "tied, and to stay so": (TIED, {**LORA, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "a tied head, to stay so": (TIED, {**LORA, "target_modules": ["lm_head"], "ensure_weight_tying": True}),
    "a tied head saved whole": (TIED, {**LORA, "target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "a tied embedding saved whole": (TIED, {**LORA, "target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}),
    "saved whole, tied, and to stay so": (TIED, {
        **LORA, "target_modules": ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "a head of Gemma 2": ((CAUSAL, "gemma2", TEXT), {**LORA, "target_modules": ["lm_head"]}),
}  # fmt: skip
LOGITS = {name for name in CASES if "tied" in name or name == "a head of Gemma 2"}
"""Compared by what the model says."""


def compare(name: str, room: Path) -> str:
    """Return how far the parameters are from PEFT's at most, in float32 roundings at the size of the largest."""
    (auto, kind, settings), lora = CASES[name]
    torch.manual_seed(7)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = getattr(transformers, auto).from_config(config)
    model.save_pretrained(room / "base")
    adapted = get_peft_model(model, LoraConfig(**lora))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(room / "adapter")
    said = _logits(adapted) if name in LOGITS else None
    theirs = adapted.merge_and_unload().state_dict()
    merge(
        {"merge_method": "passthrough", "models": [{"model": f"{room / 'base'}+{room / 'adapter'}"}]},
        room / "out",
    )
    output = getattr(transformers, auto).from_pretrained(room / "out")
    if said is not None:
        distance = (_logits(output) - said).abs().max().item() / said.abs().max().item()
        how = "tied" if output.config.tie_word_embeddings else "each stored"
        return f"{'equal' if distance < 1e-5 else 'DIFFERENT'}: logits {distance:.1g} apart, embedding and head {how}"
    ours = output.state_dict()
    plain = getattr(transformers, auto).from_pretrained(room / "base").state_dict()
    if ours.keys() != theirs.keys():
        return f"DIFFERENT NAMES: {sorted(ours.keys() ^ theirs.keys())[:3]}"
    worst, changed = 0.0, 0
    for key, value in theirs.items():
        scale = torch.finfo(torch.float32).eps * value.abs().max().item()
        worst = max(worst, (ours[key] - value).abs().max().item() / max(scale, 1e-30))
        changed += not torch.equal(ours[key], plain[key])
    verdict = "equal" if worst <= 8 and changed else "DIFFERENT"
    return f"{verdict}: {changed} of {len(ours)} tensors changed, at most {worst:.1f} roundings apart"


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval()(input_ids=torch.tensor([[3, 4, 5, 1, 7, 90]])).logits)


def main() -> int:
    """Run the cases; return how many are not equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    names = parser.parse_args().names or list(CASES)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    failed = 0
    for name in names:
        with tempfile.TemporaryDirectory() as room:
            try:
                line = compare(name, Path(room))
            except StreammergeError as error:
                line = f"REFUSED: {re.sub(re.escape(room), '', str(error))}"
        failed += not line.startswith("equal")
        print(f"{name}: {line}", flush=True)
    print(f"{len(names) - failed} of {len(names)} equal")
    return failed


if __name__ == "__main__":
    sys.exit(main())
