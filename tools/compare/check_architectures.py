"""Merge small models of many architectures, and see that transformers loads what comes out, with the right values.

    python tools/compare/check_architectures.py [NAME …]

Each architecture is built by transformers from a small config, saved as transformers saves it, and merged with a second one by
`linear`. The merged model must load without a key missing or too many, and each of its parameters must be the average of
those of the two models, loaded the same way. Models of one stack of layers are also stacked on top of themselves by `slices`.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

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
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {
    **TEXT,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
ENCODER: dict[str, Any] = {**TEXT, "type_vocab_size": 2}
SEQUENCES: dict[str, Any] = {
    "vocab_size": 96, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "num_mel_bins": 8, "max_source_positions": 16,
    "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "depth": 2,
    "embed_dim": 32,
    "num_heads": 4,
    "out_hidden_size": 32,
    "projection_dim": 16,
}
CAUSAL = "AutoModelForCausalLM"
ARCHITECTURES: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    **{name: (CAUSAL, name, TEXT) for name in (
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "granite", "olmo2", "cohere", "stablelm",
        "starcoder2", "glm", "bloom", "opt", "gpt_neox", "smollm3", "exaone4", "nemotron",
    )},
    "falcon": (CAUSAL, "falcon", {key: value for key, value in TEXT.items() if key != "head_dim"}),
    "gpt2": (CAUSAL, "gpt2", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gemma3_text": (CAUSAL, "gemma3_text", TEXT),
    "mamba": (CAUSAL, "mamba", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    **{name: (CAUSAL, name, EXPERTS) for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")},
    "bert": ("AutoModelForMaskedLM", "bert", ENCODER),
    "bert classifier": ("AutoModelForSequenceClassification", "bert", ENCODER),
    "roberta": ("AutoModelForMaskedLM", "roberta", ENCODER),
    "modernbert": ("AutoModelForMaskedLM", "modernbert", TEXT),
    "distilbert": ("AutoModelForMaskedLM", "distilbert", {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "t5": ("AutoModelForSeq2SeqLM", "t5", SEQUENCES),
    "bart": ("AutoModelForSeq2SeqLM", "bart", SEQUENCES),
    "whisper": ("AutoModelForSpeechSeq2Seq", "whisper", SEQUENCES),
    "vit": ("AutoModelForImageClassification", "vit", VISION),
    "clip": ("AutoModel", "clip", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}),
    "llava": ("AutoModelForImageTextToText", "llava", {
        "text_config": {"model_type": "llama", **TEXT}, "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_token_index": 95,
    }),
    "qwen2_vl": ("AutoModelForImageTextToText", "qwen2_vl", {
        "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        "vision_config": {**VISION, "hidden_size": 32},
    }),
    "gemma3": ("AutoModelForImageTextToText", "gemma3", {
        "text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 95,
    }),
}  # fmt: skip


def build(auto: str, kind: str, settings: Mapping[str, Any], seed: int) -> Any:
    """Return a model with random weights, tied and initialised as transformers does."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **settings)
    return getattr(transformers, auto).from_config(config, dtype=torch.float32)


def load(auto: str, directory: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    """Return the parameters of a saved model, and what its files have too many or too few."""
    model, told = getattr(transformers, auto).from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32
    )
    wrong = {
        kind: sorted(told[kind])[:3]
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if told[kind]
    }
    return dict(model.named_parameters()), str(wrong) if wrong else None


def problem_of(auto: str, kind: str, settings: Mapping[str, Any], work: Path) -> str | None:
    """Merge two models of an architecture; return what is wrong with the result."""
    for name, seed in (("a", 1), ("b", 2)):
        build(auto, kind, settings, seed).save_pretrained(work / name)
    models = [
        {"model": str(work / "a"), "parameters": {"weight": 1}},
        {"model": str(work / "b"), "parameters": {"weight": 3}},
    ]
    try:
        merge({"merge_method": "linear", "models": models}, work / "out", memory="1GiB", device="cpu")
    except StreammergeError as error:
        return str(error)
    (a, told_a), (b, _), (merged, told) = (load(auto, work / name) for name in ("a", "b", "out"))
    if told != told_a:
        return told
    if merged.keys() != a.keys():
        return f"other parameters: {sorted(merged.keys() ^ a.keys())[:3]}"
    for name, value in merged.items():
        if not torch.allclose(value, (a[name] + 3 * b[name]) / 4, rtol=1e-6, atol=1e-7):
            return f"{name} is not the average"
    return None


def problem_of_stack(auto: str, work: Path) -> str | None:
    """Stack the layers of a model twice; return what is wrong with the result."""
    part = {"sources": [{"model": str(work / "a"), "layer_range": [0, 2]}]}
    try:
        merge(
            {"merge_method": "passthrough", "slices": [part, part]},
            work / "stack",
            memory="1GiB",
            device="cpu",
        )
    except StreammergeError as error:
        return str(error)
    (a, told_a), (stack, told) = (load(auto, work / name) for name in ("a", "stack"))
    if told != told_a:
        return f"stacked: {told}"
    for name, value in stack.items():
        source = re.sub(r"\.(\d+)\.", lambda match: f".{int(match[1]) % 2}.", name, count=1)
        if source not in a or not torch.equal(value, a[source]):
            return f"stacked: {name} is not {source}"
    return None if len(stack) > len(a) else "stacked: as many parameters as before"


def main() -> None:
    """Check the architectures named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(ARCHITECTURES))
    wrong = 0
    names = parser.parse_args().names
    transformers.logging.set_verbosity_error()
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            try:
                auto, kind, settings = ARCHITECTURES[name]
                problem = problem_of(auto, kind, settings, Path(work))
                if problem is None and auto == CAUSAL:
                    problem = problem_of_stack(auto, Path(work))
            except Exception as error:
                problem = f"could not be built or loaded: {type(error).__name__}: {str(error)[:200]}"
        wrong += problem is not None
        print(f"{name:20} {problem or 'merged, loaded, every parameter the average'}", flush=True)
    print(f"{len(names)} architectures, {wrong} with problems")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
