"""Read a config before what plans and merges is imported: a config that is wrong is refused sooner."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streammerge.config.reading import config_from_mapping, load_config, parse_config
from streammerge.config.schema import MergeConfig
from streammerge.methods.catalog import load_builtin, load_file
from streammerge.methods.registry import get_method

ConfigLike = str | os.PathLike[str] | Mapping[str, Any] | MergeConfig


def read_config(config: ConfigLike, methods: str | os.PathLike[str] | None = None) -> MergeConfig:
    """Return a config as it is written, after registering all methods; `methods` is a file with the user's methods.

    Raises
    ------
    InputError
        If the config or the file of methods is bad, or there is no such method.
    """
    parsed = _parse(config)
    load_builtin()
    if methods is not None:
        load_file(Path(methods))
    for part in (*parsed.stages, parsed):
        if part.moe is None and not part.sweep:
            get_method(part.merge_method, f"{part.where}: merge_method")
    return parsed


def _parse(config: ConfigLike) -> MergeConfig:
    if isinstance(config, MergeConfig):
        return config
    if isinstance(config, Mapping):
        return config_from_mapping(config)
    if isinstance(config, str) and "\n" in config:
        return parse_config(config, "config")
    return load_config(config)
