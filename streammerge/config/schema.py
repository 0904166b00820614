"""The config as a frozen value: mergekit's YAML, read strictly.

Unknown keys are refused at every level, keys of mergekit that are not supported yet by name. The
names inside `parameters` are checked later, against the method.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from streammerge.config.references import parse_reference, parse_text
from streammerge.config.settings import Setting, parse_setting
from streammerge.config.strict_yaml import MAX_BYTES, MAX_DEPTH, UNSPEAKABLE, dump_yaml, load_yaml
from streammerge.config.wording import check_keys, child, refuse, shown
from streammerge.dtypes import NAMES

_KEYS = (
    "merge_method",
    "models",
    "base_model",
    "dtype",
    "out_dtype",
    "parameters",
    "seed",
    "exclude",
)
_KEYS_LATER = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template")
_MODEL_KEYS = ("model", "parameters", "alias", "fisher")
_MODEL_KEYS_LATER = ("layer_range", "lora", "override_architecture")


@dataclass(frozen=True)
class ModelSpec:
    """One entry of `models`."""

    reference: str
    """A directory, or a hub name with an optional ``@revision``."""
    parameters: Mapping[str, Setting] = field(default_factory=dict, hash=False)
    alias: str | None = None
    """The name that stands for the model in random masks, and tells two entries apart."""
    fisher: str | None = None
    """Path of the model's Fisher diagonal."""
    path: str = ""
    """Where it was written, for messages: ``config.yml: models[0]``."""


@dataclass(frozen=True)
class MergeConfig:
    """Everything a merge is asked to do. Its values are plain: it pickles, compares and hashes."""

    merge_method: str
    models: tuple[ModelSpec, ...]
    """In the order of the config; the base is among them only if it is listed there."""
    base_model: str | None = None
    dtype: str | None = None
    """Format code of the output dtype, such as `BF16`; the arithmetic does not depend on it. None:
    that of the inputs."""
    out_dtype: str | None = None
    """As `dtype`, and goes before it."""
    parameters: Mapping[str, Setting] = field(default_factory=dict, hash=False)
    seed: int = 0
    exclude: tuple[str, ...] = ()
    """Regular expressions of tensors that are copied from the base (or first) model."""
    text: str = ""
    """The YAML, verbatim."""
    where: str = "config"
    """The name of the config in messages."""


def parse_config(text: bytes | str, where: str = "config.yml") -> MergeConfig:
    """Return the config that the YAML `text` describes; ConfigError names what is wrong in it."""
    data = load_yaml(text, where)
    if not isinstance(data, dict):
        refuse(where, f"a config is a map of keys (merge_method, models, …), not {shown(data)}")
    verbatim = text if isinstance(text, str) else bytes(text).decode("utf-8")
    return _config(data, verbatim, where)


def load_config(path: str | os.PathLike[str]) -> MergeConfig:
    """Return the config in the file at `path`: a regular file of at most 4 MiB, or ConfigError."""
    where = os.fspath(path)
    if not isinstance(where, str):
        where = os.fsdecode(where)
    try:
        # Not blocking: a FIFO without a writer must not hold us up before fstat sees it.
        fd = os.open(where, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                refuse(where, "not a regular file (give the path of a YAML file)")
            with open(fd, "rb", closefd=False) as file:
                data = file.read(MAX_BYTES + 1)
        finally:
            os.close(fd)
    except OSError as error:
        refuse(where or "config", f"cannot be read: {error.strerror}")
    except ValueError:
        refuse(where, "NUL in a path")
    return parse_config(data, where)


def config_from_mapping(data: Mapping[str, object], where: str = "config") -> MergeConfig:
    """Return the config that `data`, shaped like the YAML, describes.

    Paths may be given as `Path`, lists as tuples. The `text` of the result is YAML that parses to
    the same config.
    """
    plain = _plain(data, f"{where}:", 0)
    if not isinstance(plain, dict):
        refuse(where, f"a config is a map of keys (merge_method, models, …), not {shown(plain)}")
    return replace(_config(plain, "", where), text=dump_yaml(plain))


def _config(data: dict[str, object], text: str, where: str) -> MergeConfig:
    top = f"{where}:"
    check_keys(data, top, _KEYS, _KEYS_LATER)
    for key in ("merge_method", "models"):
        if key not in data:
            refuse(top, f"'{key}' is missing")
    base = data.get("base_model")
    return MergeConfig(
        merge_method=parse_text(data["merge_method"], child(top, "merge_method")),
        models=_models(data["models"], child(top, "models")),
        base_model=None if base is None else parse_reference(base, child(top, "base_model")),
        dtype=_dtype(data.get("dtype"), child(top, "dtype")),
        out_dtype=_dtype(data.get("out_dtype"), child(top, "out_dtype")),
        parameters=_parameters(data.get("parameters"), child(top, "parameters")),
        seed=_seed(data.get("seed", 0), child(top, "seed")),
        exclude=_exclude(data.get("exclude", []), child(top, "exclude")),
        text=text,
        where=where,
    )


def _models(data: object, path: str) -> tuple[ModelSpec, ...]:
    if not isinstance(data, list) or not data:
        refuse(path, f"must be a list of models (- model: …), not {shown(data)}")
    models = tuple(_model(item, f"{path}[{i}]") for i, item in enumerate(data))
    seen: dict[str, int] = {}
    for i, model in enumerate(models):
        name = model.alias or model.reference
        first = seen.setdefault(name, i)
        if first != i:
            refuse(model.path, f"{shown(name)} is models[{first}] already (give one an own alias:)")
    return models


def _model(data: object, path: str) -> ModelSpec:
    if isinstance(data, str):
        data = {"model": data}
    if not isinstance(data, dict):
        refuse(path, f"must be a map (model: …), not {shown(data)}")
    check_keys(data, path, _MODEL_KEYS, _MODEL_KEYS_LATER)
    if "model" not in data:
        refuse(path, "'model' is missing")
    texts = {key: parse_text(data[key], child(path, key)) for key in ("alias", "fisher") if key in data}
    return ModelSpec(
        reference=parse_reference(data["model"], child(path, "model")),
        parameters=_parameters(data.get("parameters"), child(path, "parameters")),
        alias=texts.get("alias"),
        fisher=texts.get("fisher"),
        path=path,
    )


def _parameters(data: object, path: str) -> dict[str, Setting]:
    if data is None:
        return {}
    if not isinstance(data, dict):
        refuse(path, f"must be a map of parameters, not {shown(data)}")
    return {name: parse_setting(value, child(path, name)) for name, value in data.items()}


def _dtype(value: object, path: str) -> str | None:
    if value is None:
        return None
    code = NAMES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
    if code is None:
        refuse(path, f"{shown(value)} is none of {', '.join(NAMES)}")
    return code


def _seed(value: object, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        refuse(path, f"must be an integer from 0 to 2**64 - 1, not {shown(value)}")
    return value


def _exclude(data: object, path: str) -> tuple[str, ...]:
    if isinstance(data, str):
        data = [data]
    if not isinstance(data, list):
        refuse(path, f"must be a list of regular expressions, not {shown(data)}")
    patterns = []
    for i, item in enumerate(data):
        place = f"{path}[{i}]"
        patterns.append(parse_text(item, place))
        if len(patterns[i]) > 1000:
            refuse(place, f"{len(patterns[i])} characters, at most 1000 (write several)")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                re.compile(patterns[i])
        except (re.error, OverflowError, RecursionError, Warning) as error:
            refuse(place, f"{shown(item)} is not a regular expression: {str(error)[:100]}")
    return tuple(patterns)


def _plain(value: object, path: str, depth: int) -> object:
    """Return `value` in the types that YAML has, sharing nothing with it."""
    if depth > MAX_DEPTH:
        refuse(path, f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or UNSPEAKABLE.search(key):
                refuse(path, f"key {shown(key)} is not a string, or none that UTF-8 can encode")
        return {str(key): _plain(item, child(path, key), depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return _plain(os.fspath(value), path, depth)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and UNSPEAKABLE.search(value):
        refuse(path, f"NUL or half a surrogate pair in {shown(value)}")
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return refuse(path, f"{shown(value)} is not a value a config can hold (use float, int, str …)")
