"""The config: strict YAML in, frozen values out. Reads no model and imports no array library."""

from streammerge.config.reading import config_from_mapping, load_config, parse_config
from streammerge.config.schema import MergeConfig, ModelSpec
from streammerge.config.settings import (
    Clause,
    Scalar,
    Setting,
    parse_setting,
    value_for,
)

__all__ = [
    "Clause",
    "MergeConfig",
    "ModelSpec",
    "Scalar",
    "Setting",
    "config_from_mapping",
    "load_config",
    "parse_config",
    "parse_setting",
    "value_for",
]
