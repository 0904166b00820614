"""Resolve the value of every parameter of a method for one tensor.

Precedence: the model's own entry, its slice, its module, the top level, the preset, the method's default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from streammerge.config.known_keys import KEYS, OLD_PARAMETERS, PARAMETERS
from streammerge.config.schema import MergeConfig
from streammerge.config.settings import Scalar, Setting, value_for
from streammerge.config.wording import meant, suggestion
from streammerge.errors import ConfigError, printable
from streammerge.methods.registry import REQUIRED, Method, Parameter
from streammerge.planning.resolve.assemble import OutputTensor

PRESET = "preset"
DENSITY = "density"
_EXAMPLES = {
    ("slerp", "t"): "0.5} (0 = the base, 1 = the other model)",
    ("nearswap", "t"): "0.001} (larger values take more of the other model)",
}
"""Examples for parameters without a default, from the value on."""


def check_names(config: MergeConfig, method: Method) -> list[str]:
    """Refuse parameters that the method does not declare; return notes on parameters without effect."""
    notes = []
    for spec in config.models:
        if spec.fisher is not None and not method.fisher:
            raise ConfigError(f"{spec.path}.fisher: method {method.name!r} takes no Fisher diagonals")
        if spec.fisher is None and method.fisher:
            raise ConfigError(
                f"{spec.path}: method {method.name!r} needs the model's Fisher diagonal: `fisher: PATH`, a store "
                "or a safetensors file"
            )
        if spec.gram is not None and not method.gram:
            raise ConfigError(f"{spec.path}.gram: method {method.name!r} takes no Gram matrices")
        if spec.gram is None and method.gram:
            raise ConfigError(
                f"{spec.path}: method {method.name!r} needs the model's Gram matrices: `gram: PATH`, a store that "
                "`streammerge gram compute` makes"
            )
    for settings, in_model in config.settings():
        for name, setting in settings.items():
            if name == PRESET and settings is config.parameters and method.presets:
                continue
            if name in method.ignored:
                notes.append(f"{setting.path}: ignored: {method.ignored[name]}")
            elif name not in method.parameters and name in OLD_PARAMETERS:
                notes.append(f"{setting.path}: ignored: {OLD_PARAMETERS[name]}")
            elif name not in method.parameters and name in PARAMETERS:
                notes.append(f"{setting.path}: ignored: {method.name} has no {name!r}")
            elif name not in method.parameters and name in KEYS:
                raise ConfigError(
                    f"{setting.path}: {name!r} is not a parameter: move it to the top level of the config"
                )
            elif name not in method.parameters:
                hint = suggestion(name, [*method.parameters, *([PRESET] if method.presets else [])])
                raise ConfigError(
                    f"{setting.path}: unknown parameter {printable(name, 60)!r} of method {method.name!r} ({hint})"
                )
            elif in_model and not method.parameters[name].per_model:
                raise ConfigError(
                    f"{setting.path}: {name!r} is one value for all models: put it under `parameters:` at the top level"
                )
            elif name == DENSITY and _is_nought(setting):
                whose = "this model contributes" if in_model else "the models contribute"
                notes.append(f"{setting.path}: {whose} nothing to the merge: a density of 0 keeps no change")
    return notes


def _is_nought(setting: Setting) -> bool:
    return all(value == 0 and value is not False for clause in setting.clauses for value in clause.values)


def wants_drop(config: MergeConfig, method: Method) -> bool:
    """Return whether the config asks for a drop before the method."""
    return any(method.drop.fraction in settings for settings, _ in config.settings())


def preset_of(config: MergeConfig, method: Method) -> Mapping[str, Any]:
    """Return the defaults of the config's preset; empty without one."""
    setting = config.parameters.get(PRESET)
    if setting is None:
        return {}
    name = value_for(setting, "", 0.0)
    if name not in method.presets:
        raise ConfigError(
            f"{setting.path}: {printable(name, 60)!r} is not a preset of {method.name!r} "
            f"({suggestion(str(name), method.presets)})"
        )
    return method.presets[str(name)]


def resolve_parameters(
    method: Method, preset: Mapping[str, Any], output: OutputTensor, where: str = "config"
) -> dict[str, Any]:
    """Return the value of each declared parameter for one output tensor; a tuple if it is per model.

    Parameters
    ----------
    output
        Filters of shared settings match its name in the output; filters of a model's own settings match its name there.
    where
        The name of the config in messages.

    Raises
    ------
    ConfigError
        If a value has the wrong type or is out of range, or if only some models have a weight.
    """
    tensor, depth, models = output.name, output.depth, output.models
    values: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        default = preset.get(name, parameter.default)
        shared = [(level.get(name), tensor) for level in output.levels]
        if not parameter.per_model:
            values[name] = _one(parameter, shared, tensor, depth, default)[0]
            if values[name] is REQUIRED:
                _refuse_missing(method, name, [setting for setting, _ in shared], tensor, where)
            continue
        found = [
            _one(parameter, [(spec.parameters.get(name), own), *shared], tensor, depth, default)
            for spec, own in models
        ]
        given = [source is not None for _, source in found]
        if name == "weight" and any(given) and not all(given):
            missing, own = models[given.index(False)]
            _refuse_unmatched([missing.parameters.get(name), *(setting for setting, _ in shared)], own)
            if missing.path.endswith("base_model"):
                raise ConfigError(
                    f"{missing.path}: no weight for tensor {printable(tensor, 120)}: the base takes part as one more model: "
                    "set a top-level weight under `parameters:`, or list the base under `models:` with its own"
                )
            raise ConfigError(
                f"{missing.path}: no weight for tensor {printable(tensor, 120)}, but other models have one: give a weight to all or none"
            )
        values[name] = tuple(value for value, _ in found)
        if default is REQUIRED and not all(given):
            spec, own = models[given.index(False)]
            of_all = [spec.parameters.get(name), *(setting for setting, _ in shared)]
            _refuse_missing(method, name, of_all, own, where)
    return values


def _refuse_unmatched(settings: Sequence[Setting | None], tensor: str) -> None:
    """Refuse a setting that consists of filters only and leaves a tensor without a value."""
    for setting in settings:
        if setting is not None:
            raise ConfigError(
                f"{setting.path}: no filter matches tensor {printable(tensor, 120)}: add `- value: …` as the last entry, for "
                "all other tensors"
            )


def _refuse_missing(
    method: Method, name: str, settings: Sequence[Setting | None], tensor: str, where: str
) -> NoReturn:
    _refuse_unmatched(settings, tensor)
    example = _EXAMPLES.get((method.name, name), "…}")
    raise ConfigError(
        f"{where}: parameters: {name!r} is missing: {method.name} needs parameters: {{{name}: {example}"
    )


def _one(
    parameter: Parameter,
    settings: Sequence[tuple[Setting | None, str]],
    tensor: str,
    depth: float,
    default: Any,
) -> tuple[Any, Setting | None]:
    for setting, name in settings:
        if setting is not None and (value := value_for(setting, name, depth)) is not None:
            return _checked(parameter, value, setting.path, default), setting
    return default, None


def _checked(parameter: Parameter, value: Scalar, path: str, default: Any) -> Scalar:
    if parameter.choices:
        if value in (0, 1):  # mergekit's `rescale: true`
            first = next(choice for choice in parameter.choices if choice != "none")
            value = (default if default != "none" else first) if value else "none"
        if value not in parameter.choices:
            raise ConfigError(
                f"{path}: {printable(value, 60)!r} is not one of {', '.join(parameter.choices)}"
                f"{meant(str(value), parameter.choices)}"
            )
        return value
    if bool in parameter.kind:
        if isinstance(value, str) or value not in (
            0,
            1,
        ):  # `normalize: 1.0`, as parameter searches write it
            raise ConfigError(f"{path}: {printable(value, 60)!r} is not true or false")
        return bool(value)
    if float in parameter.kind:
        if isinstance(value, bool | str) or not math.isfinite(value):
            raise ConfigError(f"{path}: {printable(value, 60)!r} is not a number")
        _check_range(parameter, value, path)
        return float(value)
    if int in parameter.kind:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{path}: {printable(value, 60)!r} is not a whole number")
        _check_range(parameter, value, path)
    return value


def _check_range(parameter: Parameter, value: float, path: str) -> None:
    low, high = parameter.bounds or (-math.inf, math.inf)
    if not low <= value <= high:
        percent = (low, high) == (0, 1) and 1 < value <= 100
        hint = f" (a fraction: {value / 100:g} for {value:g} %)" if percent else ""
        raise ConfigError(f"{path}: {value!r} is outside the range [{low:g}, {high:g}]{hint}")
