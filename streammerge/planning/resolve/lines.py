"""Scale task vectors by layer (LiNeS): the factor of each tensor, multiplied into the method's own factor `lambda`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streammerge.config.lines import Lines
from streammerge.config.schema import MergeConfig
from streammerge.errors import ConfigError
from streammerge.methods.declaration import SCALE
from streammerge.methods.registry import Method, all_methods
from streammerge.planning.needs import layer_of


def check_lines(config: MergeConfig, method: Method) -> None:
    """Refuse `lines` for a method that has no factor of the merged task vector."""
    if config.lines is None or method.scales:
        return
    takers = ", ".join(name for name, one in all_methods().items() if one.scales)
    raise ConfigError(
        f"{config.lines.path}: it scales the merged task vector, and {method.name!r} has no factor for it (`lambda`): remove "
        f"`lines`, or use one of {takers}"
    )


def scaled_by_layer(
    lines: Lines | None, parameters: dict[str, Any], name: str, stacks: Mapping[str, int]
) -> dict[str, Any]:
    """Return a tensor's parameters with the factor of its layer; the only layer of a stack counts as the last.

    Parameters
    ----------
    stacks
        Number of layers of each stack, by its prefix.
    """
    if lines is None:
        return parameters
    layer, n_layers = layer_of(name, stacks)
    depth = None if layer is None or n_layers is None else layer / (n_layers - 1) if n_layers > 1 else 1.0
    return {**parameters, SCALE: parameters[SCALE] * lines.factor(depth)}
