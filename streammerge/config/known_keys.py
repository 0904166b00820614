"""Keys of published configs that are not in the schema: why they change nothing, or where they belong."""

from __future__ import annotations

from collections.abc import Mapping

from streammerge.config.wording import shown

KEYS = (
    "merge_method",
    "models",
    "slices",
    "modules",
    "checkpoints",
    "base_model",
    "dtype",
    "out_dtype",
    "quantize",
    "output",
    "rank",
    "energy",
    "parameters",
    "sweep",
    "seed",
    "exclude",
    "tensors",
    "lines",
    "matrices",
    "rest",
    "tokenizer",
    "tokenizer_source",
    "chat_template",
)
"""Keys of a config, at its top level."""

ANCHORS = "x-"
"""Beginning of top-level keys that only hold YAML anchors for other places, as in files of other programs."""

KEYS_WITHOUT_EFFECT: Mapping[str, str] = {
    "name": "it names a stage of mergekit-multi; the command line names the output",
    "out_path": "the command line names the output",
    "override_architecture": "tensors are matched by name, whatever the architecture",
    "residual_weight": "mergekit reads it and does nothing with it",
    "int8_mask": "it changes no number",
    "embed_slerp": "it was for vocabularies that differ; `tokenizer:` aligns them, whatever the method",
}
"""Keys of mergekit that change no output."""

OLD_PARAMETERS: Mapping[str, str] = {
    "int8_mask": "it changes no number",
    "embed_slerp": KEYS_WITHOUT_EFFECT["embed_slerp"],
    "naive_count": "mergekit reads it and does nothing with it",
}
"""Parameters of old versions of mergekit that published configs still carry."""

PARAMETERS = frozenset(
    {
        "weight",
        "density",
        "gamma",
        "epsilon",
        "normalize",
        "rescale",
        "lambda",
        "int8_mask",
        "t",
        "scale",
        "select_topk",
        "filter_wise",
        "max_iter",
        "tol",
        "eps",
        "r",
        "alpha",
        "normalize_weights",
        "nuslerp_flatten",
        "nuslerp_row_wise",
    }
)
"""Parameters of some method in mergekit. Many published configs give them to methods that lack them, where mergekit
ignores them. A name that no method has is a misspelling."""

_ELSEWHERE: Mapping[str, str] = {
    "random_seed": "'random_seed' is called 'seed' here",
    "quantization": "'quantization' is called 'quantize' here",
    "quantization_config": "'quantization_config' is a key of config.json; the output's follows from 'quantize'",
    "output_dtype": "'output_dtype' is called 'dtype'",
    "torch_dtype": "'torch_dtype' is called 'dtype'",
    "method": "'method' is called 'merge_method'",
    "base": "'base' is called 'base_model'",
    "layer_range": "'layer_range' goes into slices: - sources: [{model: x, layer_range: [0, 16]}]",
    "lora": "an adapter is part of the model: {model: x+adapter}",
    "adapter": "an adapter is part of the model: {model: x+adapter}",
    "revision": "a revision is part of the model: {model: org/name@revision}",
    "path": "a path is the model: {model: path}",
    "filter": "'filter' goes under a parameter: {parameters: {weight: [{filter: mlp, value: 0.5}, {value: 1}]}}",
}


def misplaced(key: str, value: object, data: Mapping[str, object]) -> str | None:
    """Return the cure for a key of `data` that belongs elsewhere, or None.

    >>> misplaced("weight", 0.5, {"model": "x", "weight": 0.5})
    "'weight' goes under parameters: {model: 'x', parameters: {weight: 0.5}}"
    """
    single = key.removesuffix("s")
    if key in PARAMETERS:
        return f"'{key}' goes under parameters: {_example(key, value, data)}"
    if single in PARAMETERS and single != key and key not in ("parameters",):
        model = "{model: x, parameters: {" + single + ": 0.5}}"
        return f"'{key}' is not a key: each model has its own '{single}' under parameters: {model}"
    if key in KEYS:
        return f"'{key}' belongs at the top level of the config, once for the whole merge"
    return _ELSEWHERE.get(key)


def _example(key: str, value: object, data: Mapping[str, object]) -> str:
    number = f"{value}" if isinstance(value, int | float) and not isinstance(value, bool) else "…"
    if isinstance(value, bool):
        number = shown(value)
    inner = "{" + f"{key}: {number}" + "}"
    model = data.get("model")
    if model is None:
        return inner
    return "{model: " + (shown(model) if isinstance(model, str) else "…") + ", parameters: " + inner + "}"
