"""Small models of several architectures, saved as transformers saves them, and examples for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
ENCODER = {key: value for key, value in TEXT.items() if key not in ("num_key_value_heads", "head_dim")}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
CAUSAL, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (CAUSAL, "llama", TEXT),
    "qwen2, tied": (CAUSAL, "qwen2", {**TEXT, "tie_word_embeddings": True}),
    "gemma": (CAUSAL, "gemma", TEXT),  # tied, scaled embeddings, norms of 1 + weight
    "gemma3": (CAUSAL, "gemma3_text", TEXT),  # layers of two kinds, with masks of their own
    "gpt2": (CAUSAL, "gpt2", GPT2),  # tied, transposed weights, position embeddings
    "mixtral": (CAUSAL, "mixtral", {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "bloom": (CAUSAL, "bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 1, "n_head": 4}),  # one layer
    "bert": (CLASSIFIER, "bert", {**ENCODER, "num_labels": 3, "type_vocab_size": 2}),
    "llama classifier": (CLASSIFIER, "llama", {**TEXT, "num_labels": 3, "pad_token_id": 0}),
    "albert": (CLASSIFIER, "albert", {**ENCODER, "embedding_size": 16}),  # one layer, many times
    "deberta": (CLASSIFIER, "deberta-v2", ENCODER),  # its layers run in another way
}


def make_model(name: str, directory: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Save a model of random weights, all of them random; return it."""
    transformers.utils.logging.disable_progress_bar()
    auto, kind, settings = MODELS[name]
    torch.manual_seed(seed)
    model = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(kind, **settings))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).eval().save_pretrained(directory)
    return model.float()


def make_lines(n: int = 10, longest: int = 18, seed: int = 0) -> list[dict[str, Any]]:
    """Return examples of random tokens and labels; some lengths come more than once."""
    random = np.random.default_rng(seed)
    return [
        {"input_ids": random.integers(3, 90, int(length)).tolist(), "label": int(random.integers(0, 3))}
        for length in random.integers(4, longest, n)
    ]


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
