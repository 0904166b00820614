"""Names of modules in transformers where the files of a model name them differently."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_LANGUAGE = (
    (r"^language_model\.lm_head", "lm_head"),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector|vision_model|audio_tower)\.", r"model.\1."),
)
_QWEN_VISION = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!visual\.|language_model\.)", "model.language_model."),
)
_VIT = (
    (r"(^|\.)encoder\.layer\.", r"\1layers."),
    (r"\.attention\.attention\.(q|k|v)[a-z]+$", r".attention.\1_proj"),
    (r"\.attention\.output\.dense$", ".attention.o_proj"),
    (r"\.intermediate\.dense$", ".mlp.fc1"),
    (r"(\.layers\.\d+)\.output\.dense$", r"\1.mlp.fc2"),
)
_RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    "mixtral": ((r"\.block_sparse_moe\.gate$", ".mlp.gate"),),
    "phimoe": ((r"\.block_sparse_moe\.gate$", ".mlp.router"),),
    "gpt_neox": ((r"^embed_out$", "lm_head"),),
    "vit": _VIT,
    "qwen2_vl": _QWEN_VISION,
    "qwen2_5_vl": _QWEN_VISION,
    **dict.fromkeys(
        ("llava", "llava_next", "gemma3", "paligemma", "mllama", "mistral3", "aya_vision", "qwen2_audio"),
        _LANGUAGE,
    ),
}
"""For each model type, patterns of the names of modules in files, and what transformers 5 has in their place. Experts
that are stored one by one keep their names, which PEFT recognises."""


def namer(config: Mapping[str, Any], names: Iterable[str]) -> Callable[[str], str]:
    """Return the function from the name of a module in a model's files to its name in transformers.

    Parameters
    ----------
    config
        The model's config.json.
    names
        The names of its tensors: GPT-2's files may lack a prefix that the module has.
    """
    kind = config.get("model_type")
    rules = _RENAMED.get(kind, ()) if isinstance(kind, str) else ()
    architecture = architecture_of(config)
    bare = architecture.startswith("GPT2") and architecture != "GPT2Model" and "wte.weight" in set(names)

    def rename(module: str) -> str:
        for pattern, replacement in rules:
            module = re.sub(pattern, replacement, module)
        return f"transformer.{module}" if bare else module

    return rename


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return the name of the class that a config.json names first; empty if it names none."""
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
