"""Chooses how an output is stored. The config key `quantize` decides; each value has one file in this folder."""

from __future__ import annotations

import streammerge.planning.low_rank.storage
import streammerge.planning.quantize.fp8
import streammerge.planning.quantize.plain
import streammerge.planning.quantize.same  # noqa: F401  (these register themselves)
from streammerge.errors import ConfigError, printable
from streammerge.planning.quantize.base import Material, Storage, choice_of


def choose_storage(material: Material) -> Storage:
    """Return how each tensor of the output is stored.

    Raises
    ------
    InputError
        If it cannot be stored as the config says.
    """
    storage = choice_of("lora" if material.config.lora is not None else material.config.quantize)(material)
    config, template = material.config, material.template
    if storage.declared is not None and template.folders:
        raise ConfigError(
            f"{config.where}: quantize: {printable(template.reference)} has weights in several folders "
            f"({printable(template.folders[0], 80)}/ …), whose libraries do not read this: leave `quantize` out"
        )
    return storage
