"""Compare models with LoRA adapters, merged as they are read, with what PEFT's `merge_and_unload` makes of them.

    python tools/compare_peft.py [NAME …]

Needs `peft` (and `accelerate`) beside what the tests need. Each case trains nothing: an adapter of random numbers is put on
a small random model, saved as PEFT saves it, and merged here by `passthrough` of ``base+adapter`` in float32. Every
parameter must be PEFT's own to a few float32 roundings, which its matrix product does in another order.
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
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
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
LLAMA = (CAUSAL, "llama", TEXT)
ATTENTION = ["q_proj", "v_proj"]

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
    "a tied head": ((CAUSAL, "llama", {**TEXT, "tie_word_embeddings": True}), {
        "r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens"],
    }),
}  # fmt: skip


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
    theirs = adapted.merge_and_unload().state_dict()
    merge(
        {"merge_method": "passthrough", "models": [{"model": f"{room / 'base'}+{room / 'adapter'}"}]},
        room / "out",
    )
    ours = getattr(transformers, auto).from_pretrained(room / "out").state_dict()
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
