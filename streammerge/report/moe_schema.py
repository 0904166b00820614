"""The part of the config's JSON schema that describes mixtures of experts."""

from __future__ import annotations

from typing import Any, get_args

from streammerge.config.moe import KEYS_WITHOUT_EFFECT, ExpertNames, GateMode
from streammerge.planning.moe.targets import TARGETS


def moe_definitions(reference: dict[str, Any], dtype: dict[str, Any]) -> dict[str, Any]:
    """Return the definitions ``mixture`` and ``expert``; the arguments are the schemas of a model's name and of a dtype."""
    texts = {"type": "array", "items": {"type": "string"}}
    experts = {"type": "array", "items": {"$ref": "#/$defs/expert"}}
    number = {"type": "number"}
    mixture: dict[str, Any] = {
        "base_model": {**reference, "description": "The model that everything but the MLPs comes from"},
        "experts": {**experts, "minItems": 1, "description": "The models whose MLPs become the experts"},
        "shared_experts": {**experts, "description": "Experts that see each token"},
        "gate_mode": {"enum": list(get_args(GateMode)), "description": "How the gates are made"},
        "dtype": {**dtype, "description": "Dtype of the output"},
        "experts_per_token": {
            "type": "integer",
            "minimum": 1,
            "description": "Experts that a token is routed to",
        },
        "architecture": {
            "type": "string",
            "description": ", ".join(target.title for target in TARGETS),
        },
        "expert_names": {
            "enum": list(get_args(ExpertNames)),
            "description": "classic: one by one; fused: all of a layer as one tensor",
        },
        "seed": {"type": "integer", "minimum": 0, "description": "Seed of random gates and noise"},
    }
    mixture |= {
        name: {"description": f"No effect: {why}", "deprecated": True}
        for name, why in KEYS_WITHOUT_EFFECT.items()
    }
    expert = {
        "source_model": {**reference, "description": "A directory, or org/name in the cache; model+adapter"},
        "positive_prompts": {**texts, "description": "Texts that are to be routed to it"},
        "negative_prompts": {**texts, "description": "Texts that are not"},
        "noise_scale": {**number, "minimum": 0, "description": "Standard deviation of noise on its weights"},
        "residual_scale": {**number, "description": "Factor of its output"},
    }
    return {
        "mixture": _closed(mixture, "base_model", "experts"),
        "expert": _closed(expert, "source_model"),
    }


def _closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": list(required),
    }
