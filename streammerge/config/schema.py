"""The config: mergekit's YAML, read strictly, as frozen values."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from streammerge import dtypes
from streammerge.config.settings import Setting, parse_setting
from streammerge.config.strict_yaml import load_yaml
from streammerge.errors import ConfigError, ModelError, printable
from streammerge.index.header import open_regular

_TOP_KEYS = {
    "merge_method", "models", "base_model", "dtype", "out_dtype", "parameters", "seed", "exclude",
}  # fmt: skip
_MODEL_KEYS = {"model", "parameters", "alias"}
_NOT_YET = {"slices", "modules", "tokenizer", "tokenizer_source", "chat_template", "fisher"}


@dataclass(frozen=True)
class ModelSpec:
    """One entry of ``models``."""

    reference: str
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    alias: str | None = None
    """The name of its random stream; by default a fingerprint of its content is."""
    path: str = ""
    """Where the entry stands, such as ``config.yml: models[1]``."""


@dataclass(frozen=True)
class MergeConfig:
    """A whole config. Method names and parameters are checked later, against the register."""

    merge_method: str
    models: tuple[ModelSpec, ...]
    base_model: str | None
    dtype: str | None
    """Format code of the output dtype, such as ``BF16``; arithmetic is fp32 and fp64 whatever it is."""
    out_dtype: str | None
    parameters: Mapping[str, Setting]
    seed: int
    exclude: tuple[str, ...]
    """Regular expressions of tensors copied from the base (or first) model, outside all statistics."""
    text: str
    """The YAML verbatim."""
    where: str
    """Its name in messages."""


def load_config(path: str | os.PathLike[str]) -> MergeConfig:
    """Read and check a config file."""
    where = printable(path)
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            raw = file.read((4 << 20) + 1)
    except ModelError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror}") from None
    return parse_config(raw, where)


def config_from_mapping(data: Mapping[str, Any], where: str = "config") -> MergeConfig:
    """Check a config given as a mapping; its text is the same as YAML."""
    return parse_config(yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True), where)


def parse_config(text: bytes | str, where: str = "config.yml") -> MergeConfig:
    """Turn the text of a config into a MergeConfig.

    Raises
    ------
    ConfigError
        Naming the key, what is wrong with it, and the cure.
    """
    data = load_yaml(text, where)
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: not a mapping of keys such as merge_method and models")
    _check_keys(data, _TOP_KEYS, where)
    merge_method = data.get("merge_method")
    if not isinstance(merge_method, str):
        raise ConfigError(f"{where}: merge_method: {_missing(data, 'merge_method')}")
    entries = data.get("models")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{where}: models: a non-empty list of models is needed")
    models = tuple(_model(entry, f"{where}: models[{i}]") for i, entry in enumerate(entries))
    _refuse_twins(models, where)
    base = data.get("base_model")
    raw = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    return MergeConfig(
        merge_method,
        models,
        None if base is None else _reference(base, f"{where}: base_model"),
        _dtype(data.get("dtype"), f"{where}: dtype"),
        _dtype(data.get("out_dtype"), f"{where}: out_dtype"),
        _parameters(data.get("parameters"), f"{where}: parameters"),
        _seed(data.get("seed", 0), f"{where}: seed"),
        _patterns(data.get("exclude", []), f"{where}: exclude"),
        raw,
        where,
    )


def _missing(data: Mapping[str, Any], key: str) -> str:
    return "a name is needed" if data.get(key) is None else f"{printable(data[key], 60)} is not a name"


def _check_keys(data: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in data:
        if key in _NOT_YET:
            raise ConfigError(f"{where}: {key}: not supported in this version")
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown key {printable(key, 80)!r} ({hint})")


def _model(entry: Any, where: str) -> ModelSpec:
    if isinstance(entry, str):
        entry = {"model": entry}
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: not a mapping with the key `model`")
    _check_keys(entry, _MODEL_KEYS, where)
    if "model" not in entry:
        raise ConfigError(f"{where}: the key `model` is missing")
    alias = entry.get("alias")
    if alias is not None and (not isinstance(alias, str) or not alias):
        raise ConfigError(f"{where}.alias: not a name")
    return ModelSpec(
        _reference(entry["model"], f"{where}.model"),
        _parameters(entry.get("parameters"), f"{where}.parameters"),
        alias,
        where,
    )


def _reference(value: Any, where: str) -> str:
    if isinstance(value, dict):
        if set(value) - {"path", "revision", "model"} or isinstance(value.get("lora"), dict):
            raise ConfigError(f"{where}: only `path` and `revision` are supported in this version")
        if isinstance(value.get("model"), dict):
            return _reference(value["model"], where)
        path, revision = value.get("path"), value.get("revision")
        if revision is not None and not isinstance(revision, str):
            raise ConfigError(f"{where}.revision: not a string")
        value = f"{path}@{revision}" if isinstance(path, str) and revision else path
    if not isinstance(value, str) or not value or "\0" in value:
        raise ConfigError(f"{where}: a path or `org/name` is needed, not {printable(value, 60)!r}")
    if "+" in value and not Path(value).exists():
        raise ConfigError(
            f"{where}: {printable(value)}: no such directory; `model+lora` is not supported in this version"
        )
    return value


def _refuse_twins(models: tuple[ModelSpec, ...], where: str) -> None:
    for what, key in (("alias", lambda m: m.alias), ("model", lambda m: m.alias or m.reference)):
        seen: dict[Any, str] = {}
        for spec in models:
            name = key(spec)
            if name is not None and name in seen:
                raise ConfigError(
                    f"{spec.path}: the same {what} {printable(name)!r} as {seen[name].removeprefix(where + ': ')}; "
                    "give each an `alias` of its own"
                )
            seen[name] = spec.path


def _parameters(value: Any, where: str) -> dict[str, Setting]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: not a mapping")
    return {name: parse_setting(item, f"{where}.{printable(name, 80)}") for name, item in value.items()}


def _dtype(value: Any, where: str) -> str | None:
    if value is None:
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else ""
    if name not in dtypes.NAMES:
        raise ConfigError(f"{where}: {printable(value, 60)!r} is not one of {', '.join(dtypes.NAMES)}")
    return dtypes.NAMES[name]


def _seed(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < 2**64:
        raise ConfigError(f"{where}: {printable(value, 60)} is not a whole number from 0 to 2**64 - 1")
    return value


def _patterns(value: Any, where: str) -> tuple[str, ...]:
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise ConfigError(f"{where}: not a list of regular expressions")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"{where}: {printable(pattern, 80)!r}: {printable(error, 80)}") from None
    return tuple(patterns)
