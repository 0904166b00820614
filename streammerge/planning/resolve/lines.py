"""Scale task vectors by layer (LiNeS): by the method's own factor `lambda`, or on top of a method that has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streammerge.config.lines import Lines
from streammerge.config.schema import MergeConfig
from streammerge.errors import ConfigError
from streammerge.methods.declaration import LAYER_SCALE, SCALE
from streammerge.methods.registry import Method, all_methods
from streammerge.planning.needs import layer_of


def check_lines(config: MergeConfig, method: Method) -> None:
    """Refuse `lines` for a method whose result is not the base plus a merged task vector."""
    if config.lines is None:
        return
    parts = [part for module in config.modules for part in module.slices]
    if method.has_task_vectors and all(part.base is not None for part in parts):
        return
    if method.has_task_vectors:
        raise ConfigError(
            f"{config.lines.path}: it scales the change of the base: set base_model, or remove `lines`"
        )
    takers = ", ".join(name for name, one in all_methods().items() if one.has_task_vectors)
    raise ConfigError(
        f"{config.lines.path}: it scales the merged task vector, and {method.name!r} merges models, not task vectors: remove "
        f"`lines`, or use one of {takers}"
    )


def scaled_by_layer(
    lines: Lines | None, method: Method, parameters: dict[str, Any], name: str, stacks: Mapping[str, int]
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
    factor = lines.factor(depth)
    if method.scales:
        return {**parameters, SCALE: parameters[SCALE] * factor}
    return {**parameters, LAYER_SCALE: factor}
