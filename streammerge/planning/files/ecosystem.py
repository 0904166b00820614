"""The library that loads the output; it determines the names of the weights' files and the settings that are read."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from streammerge.checkpoint.index import Component, TensorIndex
from streammerge.io import volumes
from streammerge.records import dataclass


@dataclass(frozen=True)
class Ecosystem:
    """A library and its conventions."""

    library: str
    """The library's name on the hub; empty if unknown."""
    stem: str = "model"
    """Beginning of the names of the weights' files."""


UNKNOWN = Ecosystem("")
TRANSFORMERS = Ecosystem("transformers")
SENTENCE_TRANSFORMERS = Ecosystem("sentence-transformers")
TIMM = Ecosystem("timm")
DIFFUSERS = Ecosystem("diffusers", "diffusion_pytorch_model")
OPEN_CLIP = Ecosystem("open_clip", "open_clip_model")
MISTRAL = Ecosystem("mistral-common", "consolidated")


def ecosystem_of(template: TensorIndex) -> Ecosystem:
    """Return the library that saved a model: its config.json decides, then the names of its files."""
    names = {os.path.basename(stamp.path) for stamp in template.stamps}
    found = _known_by(template.config, names)
    if found not in (DIFFUSERS, OPEN_CLIP) and volumes.lexists(template.directory / "modules.json"):
        return SENTENCE_TRANSFORMERS
    return found


def ecosystem_of_component(component: Component) -> Ecosystem:
    """Return the library that saved a folder of a model; text encoders of diffusers pipelines are transformers'."""
    return _known_by(component.config, component.names)


def _known_by(config: Mapping[str, Any], names: Collection[str]) -> Ecosystem:
    if "_diffusers_version" in config or ("_class_name" in config and "model_type" not in config):
        return DIFFUSERS
    if any(name.startswith("open_clip_") for name in names):
        return OPEN_CLIP
    if any(name.startswith("consolidated") for name in names):
        return MISTRAL
    if any(name.startswith("diffusion_pytorch_model") for name in names):
        return DIFFUSERS
    if reads_dtype(config):
        return TRANSFORMERS
    return TIMM if "architecture" in config and "num_features" in config else UNKNOWN


def reads_dtype(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json belongs to transformers, whose loader takes the dtype from it."""
    return any(key in config for key in ("model_type", "architectures", "transformers_version"))
