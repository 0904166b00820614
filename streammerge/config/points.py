"""The points of a sweep: each is the config of one merge, with a name for its directory."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import product
from typing import Any, cast

from streammerge.config.schema import MergeConfig, config_of
from streammerge.config.settings import Setting
from streammerge.config.stages import staged_config
from streammerge.config.strict_yaml import dump_yaml, load_documents
from streammerge.config.wording import refuse, shown
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

_KEY = "sweep"
_LONGEST_NAME = 200
"""Most bytes of a directory's name; file systems allow 255, some of which are left for suffixes."""
_UNSAFE = late_pattern(r"[^A-Za-z0-9._+-]|\.(?=safetensors\Z)")
"""Characters of a value that are escaped in the name of a directory: a path must not end like a single file's."""


@dataclass(frozen=True)
class Point:
    """One point of a sweep."""

    name: str
    """The name of its directory: ``lambda=0.3,density=0.1``."""
    spelled: tuple[tuple[str, str], ...]
    """Each parameter with its value as the config spells it."""
    config: MergeConfig
    """The config that gives its output to `merge`: the values at the top level, and nowhere else."""


def points_of(config: MergeConfig) -> list[Point]:
    """Return the points of a config's sweep, the last parameter varying fastest.

    Raises
    ------
    ConfigError
        If two values are spelled alike, or a point is not a sound config.
    """
    documents = load_documents(config.text, config.where)
    number = next(i for i, one in enumerate(documents) if isinstance(one, dict) and _KEY in one)
    swept = cast(dict[str, list[object]], _map(documents[number])[_KEY])
    texts = _map(_map(load_documents(config.text, config.where, verbatim=True)[number])[_KEY])
    choices = [
        [(name, value, str(text)) for value, text in zip(values, texts[name], strict=True)]
        for name, values in swept.items()
    ]
    points: dict[str, Point] = {}
    for chosen in product(*choices):
        spelled = tuple((name, text) for name, _, text in chosen)
        name = directory_name(spelled)
        if name in points:
            refuse(config.sweep[0].path.rpartition(".")[0], f"two points are called {shown(name)}")
        values = {key: value for key, value, _ in chosen}
        points[name] = Point(name, spelled, _config_at(config, documents, number, values))
    return list(points.values())


def directory_name(spelled: tuple[tuple[str, str], ...]) -> str:
    """Return the name of a point's directory; characters that a path cannot hold are escaped as in a URL.

    >>> directory_name((("lambda", "0.30"), ("trim_scope", "a/b")))
    'lambda=0.30,trim_scope=a%2Fb'
    """
    name = ",".join(f"{_safe(key)}={_safe(text)}" for key, text in spelled)
    if len(name) <= _LONGEST_NAME:
        return name
    from hashlib import blake2b

    return f"{name[: _LONGEST_NAME - 17]}~{blake2b(name.encode(), digest_size=8).hexdigest()}"


def _safe(text: str) -> str:
    return _UNSAFE.sub(lambda found: "".join(f"%{byte:02X}" for byte in found.group().encode()), text)


def _config_at(
    config: MergeConfig, documents: list[object], number: int, values: dict[str, object]
) -> MergeConfig:
    """Return the config of a point: the swept values at the top level of the output's document, and nowhere else."""
    data = deepcopy(_map(documents[number]))
    del data[_KEY]
    for holder in _holders(data):
        _remove(holder, values)
    own = data.get("parameters")
    data["parameters"] = {**(own if isinstance(own, dict) else {}), **values}
    texts = [dump_yaml(data if i == number else one) for i, one in enumerate(documents)]
    text = "---\n".join(texts)
    if len(documents) > 1:
        whole = [data if i == number else one for i, one in enumerate(documents)]
        found = staged_config(whole, text, config.where)
    else:
        found = config_of(data, text, config.where)
    paths = {one.name: one.path for one in config.sweep}
    parameters: dict[str, Setting] = {
        name: replace(setting, path=paths.get(name, setting.path))
        for name, setting in found.parameters.items()
    }
    return replace(found, parameters=parameters)


def _holders(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every map of a config that may have `parameters`: itself, modules, slices, models, sources."""
    yield data
    below = data.get("modules")
    lists = [data.get("models"), data.get("slices"), data.get("sources")]
    for part in [
        *(below.values() if isinstance(below, dict) else ()),
        *(x for one in lists for x in one or ()),
    ]:
        if isinstance(part, dict):
            yield from _holders(part)


def _remove(holder: dict[str, Any], values: dict[str, object]) -> None:
    parameters = holder.get("parameters")
    if isinstance(parameters, dict):
        holder["parameters"] = {key: value for key, value in parameters.items() if key not in values}
        if not holder["parameters"]:
            del holder["parameters"]


def _map(value: object) -> dict[str, Any]:
    assert isinstance(value, dict)
    return value
