"""Names that libraries use for the files of a model's weights, and that loaders look for."""

from __future__ import annotations

import re

from streammerge.lazy import late_pattern

STEMS = ("model", "diffusion_pytorch_model", "open_clip_model", "consolidated")
"""Stems of the names of an output's weight files, by the library that reads them."""
_STEM = "|".join(STEMS)
_WEIGHTS = late_pattern(rf"(?:{_STEM})(?:-\d{{5,}}-of-\d{{5,}})?\.safetensors", re.ASCII)


def weight_file(stem: str, number: int = 0, count: int = 1) -> str:
    """Return the name of weight file `number` (from 0) of `count`.

    >>> weight_file("model"), weight_file("model", 1, 3)
    ('model.safetensors', 'model-00002-of-00003.safetensors')
    """
    return f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors"


def index_file(stem: str) -> str:
    """Return the name of the index of several weight files.

    >>> index_file("diffusion_pytorch_model")
    'diffusion_pytorch_model.safetensors.index.json'
    """
    return f"{stem}.safetensors.index.json"


INDEXES = tuple(index_file(stem) for stem in STEMS)
"""All possible names of an output's index."""
PIPELINE = "model_index.json"
"""The file that marks a folder as a diffusers pipeline."""
ADAPTER_CONFIG = "adapter_config.json"
"""The file that marks a folder as an adapter."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OUTPUT_MANIFEST = "streammerge.json"
"""The file that marks a folder as a finished output of this package."""
OUTPUT_STATE = ".streammerge"
"""The directory that marks a folder as an output that is being written."""
LISTS = (PIPELINE, ADAPTER_CONFIG, *INDEXES)
"""Names of files that list, or mark, other files of a finished model."""
LOADED = (*LISTS, ADAPTER_WEIGHTS, *(weight_file(stem) for stem in STEMS))
"""Names by which a loader recognises a finished model."""


def is_weight_file(name: str) -> bool:
    """Return whether the name is a possible name of an output's weight file.

    >>> is_weight_file("model-00001-of-00002.safetensors"), is_weight_file("model-old.safetensors")
    (True, False)
    """
    return _WEIGHTS.fullmatch(name) is not None
