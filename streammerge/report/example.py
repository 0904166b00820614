"""Make an example config for any method from its declaration."""

from __future__ import annotations

from typing import Any

from streammerge.methods.registry import REQUIRED, Method, Parameter

_MODELS = ("math", "code", "chat", "law", "biology")
_SHOWN: dict[str, Any] = {
    "t": 0.5,
    "weight": 1.0,
    "density": 0.5,
    "gamma": 0.01,
    "epsilon": 0.1,
    "select_topk": 0.1,
    "lambda": 1.0,
}
"""Values of parameters that configs usually set."""
_SHOWN_FOR: dict[str, dict[str, Any]] = {
    "nearswap": {"t": 0.001},
    "ties": {"density": 0.2},
    "breadcrumbs": {"density": 0.9},
    "breadcrumbs_ties": {"density": 0.9},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"epsilon": 1e-5},
}
_MEANING = {
    "weight": "weight of the model",
    "density": "fraction of the model's changes to keep",
    "normalize": "divide by the sum of the weights",
    "lambda": "scales all changes together",
    "t": "0: the base, 1: the other model",
    "drop_rate": "fraction of the model's changes to drop at random first",
    "drop_rescale": "how to rescale the remaining changes",
    "drop_mask": "how to choose the dropped changes",
    "shared_mask": "the same mask for all models",
    "gamma": "fraction of the largest changes to drop",
    "epsilon": "see `streammerge methods`",
}


def example_config(method: Method) -> str:
    """Return a short config, without comments."""
    lines = [line for line in commented_config(method).splitlines() if not line.lstrip().startswith("#")]
    return "".join(f"{line.split('  #')[0].rstrip()}\n" for line in lines if line)


def commented_config(method: Method) -> str:
    """Return a config with every parameter of a method: those usually set, and the rest as comments."""
    count = _count(method)
    own = [p for p in method.parameters.values() if p.per_model]
    shared = [p for p in method.parameters.values() if not p.per_model]
    lines = [
        f"# {method.summary}",
        f"# Every parameter is explained by: streammerge methods {method.name}",
        "",
    ]
    lines.append(f"merge_method: {method.name}")
    if method.base != "none":
        # A base that is one more model would need its own weight.
        mark = "# " if method.base == "member" else ""
        lines.append(_commented(f"{mark}base_model: {_path('base')}", _base_meaning(method)))
    lines.append("models:")
    for name in _MODELS[:count]:
        lines.append(
            _commented(f"  - model: {_path(name)}", "a directory, or org/name in the Hugging Face cache")
        )
        lines += _beside(method, name)
        lines += _block(method, own, "    ")
    lines += _block(method, shared, "")
    lines += [
        _commented("dtype: bfloat16", "dtype of the output"),
        _commented("# quantize: fp8", "storage of the output: none, same or fp8"),
        _commented("# seed: 0", "seed of random draws"),
        _commented('# exclude: ["lm_head"]', "regular expressions of tensors to copy instead of merging"),
        _commented("# tokenizer_source: union", "if the models' vocabularies differ"),
    ]
    return "\n".join(lines) + "\n"


def _count(method: Method) -> int:
    least, most = method.n_models
    count = max(2, least)
    return min(count, most) if most is not None else count


def _base_meaning(method: Method) -> str:
    if method.base == "required":
        return "the model that the others were fine-tuned from"
    if method.base == "member":
        return "optional: one more model, listed below too; provides config.json and the tokenizer"
    if method.base == "template":
        return "optional: provides config.json and the tokenizer"
    return "optional: without it, whole models are merged instead of their changes"


def _beside(method: Method, name: str) -> list[str]:
    lines = []
    if method.fisher:
        lines.append(_commented(f"    fisher: {name}.zarr", "made by `streammerge fisher compute`"))
    if method.gram:
        lines.append(_commented(f"    gram: {name}-gram.zarr", "made by `streammerge gram compute`"))
    return lines


def _block(method: Method, parameters: list[Parameter], indent: str) -> list[str]:
    """Return the lines of ``parameters:``, with unset ones as comments; empty if there are no parameters."""
    if not parameters:
        return []
    values = [(parameter, _value(method, parameter)) for parameter in parameters]
    # Comments alone would make it an empty map.
    off = "" if any(value is not None for _, value in values) else "# "
    lines = [f"{indent}{off}parameters:"]
    for parameter, value in values:
        text = _yaml(parameter.default if value is None else value)
        mark = "" if value is not None else "# "
        lines.append(_commented(f"{indent}  {mark}{parameter.name}: {text}", _meaning(parameter)))
    return lines


def _value(method: Method, parameter: Parameter) -> Any:
    """Return a parameter's value in the config; None if its default suffices."""
    known = _SHOWN_FOR.get(method.name, {}).get(parameter.name, _SHOWN.get(parameter.name))
    if known is None and parameter.default is REQUIRED:
        return _middle(parameter)
    return known if parameter.default is not None else None


def _middle(parameter: Parameter) -> Any:
    if parameter.choices:
        return parameter.choices[0]
    if bool in parameter.kind:
        return True
    if int in parameter.kind:
        return 1
    return sum(parameter.bounds) / 2 if parameter.bounds else 0.5


def _meaning(parameter: Parameter) -> str:
    parts = [_MEANING[parameter.name]] if parameter.name in _MEANING else []
    if parameter.choices:
        parts.append(" | ".join(parameter.choices))
    elif parameter.bounds:
        parts.append(f"{parameter.bounds[0]:g} to {parameter.bounds[1]:g}")
    return "; ".join(parts)


def _yaml(value: Any) -> str:
    if value is None or value is REQUIRED:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, int | float) else str(value)
    # YAML parses 1e-06 as a string.
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text


def _path(name: str) -> str:
    return f"models/{name}"


def _commented(line: str, comment: str) -> str:
    return f"{line:<34}  # {comment}" if comment else line
