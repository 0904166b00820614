"""The dense architectures that a mixture of experts is built from.

A setting that config.json does not state has its architecture's default, and the mixture's architecture may have a
different one: Mixtral's `rope_theta` is 1e6, Llama's 1e4. So the defaults are written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

from streammerge.records import dataclass

_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_THETA = 10000.0


@dataclass(frozen=True)
class Family:
    """A dense architecture with the tensor names of Llama."""

    model_type: str
    """Its name in config.json."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings that config.json may leave out."""
    grouped_heads: bool = False
    """Whether `num_key_value_heads` has a default of its own; otherwise it is the number of heads."""

    def completed(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return a config.json with the defaults written out."""
        found = {**_COMMON, **self.defaults, **settings}
        if not self.grouped_heads and found.get("num_key_value_heads") is None:
            found["num_key_value_heads"] = found.get("num_attention_heads")
        if "rope_parameters" not in found:
            found.setdefault("rope_theta", _THETA)
        return found


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", {"max_position_embeddings": 2048, "attention_bias": False}),
        Family(
            "mistral",
            {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
            grouped_heads=True,
        ),
        Family(
            "qwen2",
            {"max_position_embeddings": 32768, "num_key_value_heads": 32, "use_sliding_window": False},
            grouped_heads=True,
        ),
        Family(
            "qwen3",
            {
                "max_position_embeddings": 32768,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "use_sliding_window": False,
                "attention_bias": False,
            },
            grouped_heads=True,
        ),
    )
}
"""The architectures, by their `model_type`."""
