"""The models, tokenizers and adapters that both programs merge."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LAYERS, HIDDEN, INTER, KV, VOCAB = 4, 32, 48, 16, 64


SPREADS = {"a": 5e-3, "b": 4e-3, "c": 5e-2, "d": 1e-4, "e": 5e-5, "v": 6e-2, "w": 4e-3}
"""Deviation of each model from the base, whose weights are normal with 0.05."""


PLAIN = {f"t{i}": i for i in range(VOCAB)}


TOKENIZERS = {
    **dict.fromkeys(["base", "a", "b", "c"], PLAIN),
    "v": {f"t{i if i < 3 else VOCAB + 2 - i}": i for i in range(VOCAB)}
    | {"<|im_start|>": VOCAB, "<|im_end|>": VOCAB + 1},
    "w": {f"t{i}": i for i in range(VOCAB - 3)}
    | {"<|im_end|>": VOCAB - 3, "<x>": VOCAB - 2, "<y>": VOCAB - 1},
}
"""Vocabularies; `v` and `w` have others than the base, and `v` more rows."""


IGNORED_FIELDS = ("transformers_version", "_name_or_path")
"""Keys of config.json that say who wrote it."""


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INTER,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "transformers_version": "5.0.0",
    "use_cache": True,
    "vocab_size": VOCAB,
}


# --- models


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of a llama model."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        yield p + "input_layernorm.weight", (HIDDEN,)
        yield p + "post_attention_layernorm.weight", (HIDDEN,)
        for name, rows, columns in (
            ("mlp.down_proj", HIDDEN, INTER),
            ("mlp.gate_proj", INTER, HIDDEN),
            ("mlp.up_proj", INTER, HIDDEN),
            ("self_attn.k_proj", KV, HIDDEN),
            ("self_attn.v_proj", KV, HIDDEN),
            ("self_attn.q_proj", HIDDEN, HIDDEN),
            ("self_attn.o_proj", HIDDEN, HIDDEN),
        ):
            yield f"{p}{name}.weight", (rows, columns)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def write_models(directory: Path, dtype: str) -> None:
    """Write the base and its fine-tunes, the same values in every dtype but for rounding."""
    rng = np.random.default_rng(0)
    base = {name: rng.standard_normal(shape) * 0.05 + ("norm" in name) for name, shape in shapes()}
    for name, spread in {"base": 0.0, **SPREADS}.items():
        model = directory / name
        model.mkdir(parents=True)
        tuned = {
            key: (value + spread * rng.standard_normal(value.shape)).astype(dtype)
            for key, value in base.items()
        }
        n_rows = VOCAB
        if name in TOKENIZERS:
            write_tokenizer(model, TOKENIZERS[name])
            n_rows = len(TOKENIZERS[name])
        if n_rows > VOCAB:
            for key in ("model.embed_tokens.weight", "lm_head.weight"):
                more = rng.standard_normal((n_rows - VOCAB, HIDDEN)) * 0.05
                tuned[key] = np.concatenate([tuned[key], more.astype(dtype)])
        save_file(tuned, model / "model.safetensors", metadata={"format": "pt"})
        (model / "config.json").write_text(
            json.dumps({**CONFIG, "dtype": dtype, "vocab_size": n_rows}, indent=2, sort_keys=True) + "\n"
        )
    write_adapter(directory / "adapter", rng)


def write_tokenizer(model: Path, ids: Mapping[str, int]) -> None:
    """Write a tokenizer without merges: words as they are, other tokens as added ones."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": n, "content": t, **flags, "special": True} for t, n in ids.items() if t.startswith("<")]
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "merges": [],
        "vocab": {text: number for text, number in ids.items() if not text.startswith("<")},
    }
    nothing = dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    )
    data = {"version": "1.0", "added_tokens": added, **nothing, "model": bpe}
    (model / "tokenizer.json").write_text(json.dumps(data))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def write_adapter(directory: Path, rng: np.random.Generator) -> None:
    """Write a LoRA adapter of the base."""
    directory.mkdir()
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{part}.weight": (
            rng.standard_normal(shape) * 0.05
        ).astype(np.float32)
        for layer in range(LAYERS)
        for name, rows in (("q_proj", HIDDEN), ("v_proj", KV))
        for part, shape in (("A", (4, HIDDEN)), ("B", (rows, 4)))
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": str(directory.parent / "base"),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
