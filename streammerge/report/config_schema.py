"""The JSON schema of the config, with which editors complete keys and method names, and mark misspelt ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from streammerge.config.known_keys import ANCHORS, KEYS_WITHOUT_EFFECT
from streammerge.config.matrices import Rest
from streammerge.config.schedules import KINDS
from streammerge.config.tensors import Tensors
from streammerge.config.tokenizer import TEMPLATES
from streammerge.config.values import QUANTIZE
from streammerge.dtypes import NAMES, SHORT_NAMES
from streammerge.methods.registry import Method, Parameter
from streammerge.report.moe_schema import moe_definitions

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SCALAR = {"type": ["number", "boolean", "string", "null"]}


def config_schema(methods: Mapping[str, Method]) -> dict[str, Any]:
    """Return a schema of configs for these methods.

    It checks the keys, not their dependencies; `streammerge plan` checks those.
    """
    reference = {"$ref": "#/$defs/reference"}
    parameters = {"$ref": "#/$defs/parameters"}
    models = {
        "type": "array",
        "items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/model"}]},
        "minItems": 1,
    }
    slices = {"type": "array", "items": {"$ref": "#/$defs/slice"}, "minItems": 1}
    dtype = {"enum": [*NAMES, *(f"torch.{name}" for name in NAMES), *SHORT_NAMES]}
    top = {
        "merge_method": {"enum": list(methods), "description": "The merge method; see `streammerge methods`"},
        "models": models,
        "slices": slices,
        "modules": {"type": "object", "additionalProperties": {"$ref": "#/$defs/module"}},
        "checkpoints": _checkpoints(),
        "base_model": {**reference, "description": "The model that the others were fine-tuned from"},
        "dtype": {**dtype, "description": "Dtype of the output; the arithmetic does not depend on it"},
        "out_dtype": {**dtype, "description": "The same as dtype; takes precedence over it"},
        "quantize": {
            "enum": list(QUANTIZE),
            "description": "Storage of the output: none (floats), same (as the base, or the first model) or fp8 (blocks)",
        },
        "output": {
            "anyOf": [{"const": "lora"}, {"$ref": "#/$defs/lora"}],
            "description": "lora: an adapter of the result minus its base, in place of the merged model",
        },
        "rank": {"type": "integer", "minimum": 1, "description": "Rank of the adapter"},
        "energy": {
            **_NUMBER,
            "exclusiveMinimum": 0,
            "maximum": 1,
            "description": "Share of the squared norm of each module's change, in place of a rank",
        },
        "parameters": parameters,
        "sweep": {
            "type": "object",
            "additionalProperties": {"type": "array", "items": _SCALAR, "minItems": 1},
            "description": "Parameters with several values; `streammerge sweep` merges every combination",
        },
        "seed": {"type": "integer", "minimum": 0, "description": "Seed of random draws"},
        "exclude": {
            "type": ["array", "string"],
            "items": {"type": "string"},
            "description": "Regular expressions; matching tensors are copied, not merged",
        },
        "tensors": {
            "enum": list(get_args(Tensors)),
            "description": "same: all models have the same tensors; common: merge those that all have; any: merge each over the models that have it",
        },
        "lines": {
            **_object({"alpha": _NUMBER, "beta": _NUMBER}, "alpha", "beta"),
            "description": "Scale of the task vectors by layer: alpha + beta * l / (L - 1); outside the layers alpha",
        },
        "matrices": {
            "type": "string",
            "description": "Regular expression of the tensors that are merged as matrices; default: those of the layers",
        },
        "rest": {
            "enum": list(get_args(Rest)),
            "description": "What tensors that are not matrices get: the mean of the task vectors, or no change",
        },
        "tokenizer": {"type": "object", "description": "The vocabulary of the output"},
        "tokenizer_source": {**reference, "description": "union, base, or a model"},
        "chat_template": {"type": "string", "description": f"auto, {', '.join(TEMPLATES)}, or Jinja"},
    }
    ignored: dict[str, Any] = {
        name: {"description": f"No effect: {why}", "deprecated": True}
        for name, why in KEYS_WITHOUT_EFFECT.items()
    }
    return {
        "$schema": _DIALECT,
        "title": "streammerge config",
        "anyOf": [{"$ref": "#/$defs/merge"}, {"$ref": "#/$defs/mixture"}],
        "$defs": {
            "merge": {**_object(top | ignored, "merge_method"), "patternProperties": {f"^{ANCHORS}": True}},
            **moe_definitions(reference, dtype),
            "reference": {"type": ["string", "object"]},
            "parameters": {"type": "object", "properties": _parameters(methods)},
            "model": _object(_model(reference, parameters), "model"),
            "slice": _object(
                {
                    "sources": {"type": "array", "items": {"$ref": "#/$defs/source"}, "minItems": 1},
                    "base_model": reference,
                    "parameters": parameters,
                },
                "sources",
            ),
            "source": _object({**_model(reference, parameters), "layer_range": _LAYER_RANGE}, "model"),
            "module": _object({"models": models, "slices": slices, "parameters": parameters}),
            "lora": _lora(reference),
        },
    }


_NUMBER = {"type": "number"}
_OBJECT = {"type": "object", "additionalProperties": False}
_STRIP = "The prefix that is taken off the names of its tensors"
_LAYER_RANGE = {"type": "array", "items": {"type": ["integer", "string"]}, "minItems": 2, "maxItems": 2}


def _lora(reference: dict[str, Any]) -> dict[str, Any]:
    text, flag = {"type": "string"}, {"type": "boolean"}
    return _object(
        {
            "kind": {"const": "lora"},
            "base": {**reference, "description": "The model that the adapter belongs to"},
            "max_rank": {"type": "integer", "minimum": 1, "description": "The most that energy may choose"},
            "include": {**text, "description": "Regular expression of the modules in the adapter"},
            "exclude": {**text, "description": "Regular expression of the modules that it leaves out"},
            "embeddings": {**flag, "description": "Decompose embeddings and heads too"},
            "modules_to_save": {
                "type": "array",
                "items": text,
                "description": "Modules that are stored whole",
            },
            "drop_rest": {**flag, "description": "Leave out all that is not decomposed"},
        },
        "kind",
    )


def _checkpoints() -> dict[str, Any]:
    text = {"type": "string"}
    named = [kind if not known.decay else f"{kind}:…" for kind, known in KINDS.items()]
    return _object(
        {
            "directory": {
                "anyOf": [text, {"type": "array", "items": text, "minItems": 1}],
                "description": "Directory whose checkpoints are averaged, in natural order",
            },
            "pattern": {**text, "description": "Pattern of their names, such as checkpoint-*"},
            "strip": {**text, "description": _STRIP},
            "last": {"type": "integer", "minimum": 1, "description": "Only this many of the newest"},
            "schedule": {
                "anyOf": [text, _object({"kind": {"enum": list(KINDS)}, "decay": True}, "kind")],
                "description": ", ".join(named),
            },
        },
        "directory",
    )


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {**_OBJECT, "properties": properties, "required": list(required)}


def _model(reference: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    path = {"type": "string"}
    return {
        "model": {
            **reference,
            "description": "A directory, or org/name in the Hugging Face cache; model+adapter",
        },
        "parameters": parameters,
        "alias": {**path, "description": "Names the model's random stream"},
        "fisher": {**path, "description": "Its Fisher diagonal: a store or a safetensors file"},
        "gram": {**path, "description": "Its store of Gram matrices"},
        "strip": {**path, "description": _STRIP},
    }


def _parameters(methods: Mapping[str, Method]) -> dict[str, Any]:
    """Return the schema of every parameter of any method."""
    takers: dict[str, list[tuple[str, Parameter]]] = {}
    for name, method in methods.items():
        for parameter in method.parameters.values():
            takers.setdefault(parameter.name, []).append((name, parameter))
    return {name: _setting(found, len(methods)) for name, found in sorted(takers.items())}


def _setting(takers: list[tuple[str, Parameter]], n_methods: int) -> dict[str, Any]:
    """Return the schema of a parameter: a value, a gradient over the layers, or values by filter."""
    whose = "every method" if len(takers) == n_methods else ", ".join(name for name, _ in takers)
    value: dict[str, Any] = dict(_SCALAR)
    if all(parameter.choices for _, parameter in takers):
        value = {"enum": sorted({choice for _, parameter in takers for choice in parameter.choices})}
    by_filter = {
        "type": "object",
        "properties": {"filter": {"type": ["string", "null"]}, "value": True},
        "required": ["value"],
        "additionalProperties": False,
    }
    gradient = {"type": "array", "items": {"anyOf": [{"type": "number"}, by_filter]}, "minItems": 1}
    return {"description": f"Parameter of {whose}", "anyOf": [value, gradient]}
