"""The prefixes that a config takes off the names of its models' tensors."""

from __future__ import annotations

from streammerge.config.schema import MergeConfig
from streammerge.config.wording import child, refuse, shown


def strips_of(config: MergeConfig) -> dict[str, str]:
    """Return the prefix that is taken off the names of each model, by its reference.

    Raises
    ------
    ConfigError
        If a model is named with two different prefixes.
    """
    parts = [part for module in config.modules for part in module.slices]
    given = [(spec.reference, spec.strip, spec.path) for part in parts for spec in part.sources]
    given += [(config.base_model or "", config.base_strip, f"{config.where}: base_model")]
    given += [(part.base_model or "", part.base_strip, child(part.path, "base_model")) for part in parts]
    found: dict[str, str] = {}
    for reference, prefix, path in given:
        if reference and found.setdefault(reference, prefix) != prefix:
            refuse(
                path,
                f"{shown(reference)} has `strip: {shown(found[reference])}` elsewhere: give both the same",
            )
    return found
