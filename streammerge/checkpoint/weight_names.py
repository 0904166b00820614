"""What libraries call the files of a model's weights: the names that a loader looks for."""

from __future__ import annotations

import re

STEMS = ("model", "diffusion_pytorch_model", "open_clip_model", "consolidated")
"""Beginnings of the names that an output's weights may have, by the library that reads them."""
_STEM = "|".join(STEMS)
_WEIGHTS = re.compile(rf"(?:{_STEM})(?:-\d{{5,}}-of-\d{{5,}})?\.safetensors", re.ASCII)


def weight_file(stem: str, number: int = 0, count: int = 1) -> str:
    """Return the name of one of `count` files.

    >>> weight_file("model"), weight_file("model", 1, 3)
    ('model.safetensors', 'model-00002-of-00003.safetensors')
    """
    return f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors"


def index_file(stem: str) -> str:
    """Return the name of the index of several files.

    >>> index_file("diffusion_pytorch_model")
    'diffusion_pytorch_model.safetensors.index.json'
    """
    return f"{stem}.safetensors.index.json"


INDEXES = tuple(index_file(stem) for stem in STEMS)
"""Every name that an output's index may have."""
PIPELINE = "model_index.json"
"""The file that makes a folder a pipeline of diffusers."""
LISTS = (PIPELINE, *INDEXES)
"""Names of files that lead to other files of a finished model."""
LOADED = (*LISTS, *(weight_file(stem) for stem in STEMS))
"""Names that mean a finished model to a loader."""


def is_weight_file(name: str) -> bool:
    """Return whether an output's weights may be in a file of this name.

    >>> is_weight_file("model-00001-of-00002.safetensors"), is_weight_file("model-old.safetensors")
    (True, False)
    """
    return _WEIGHTS.fullmatch(name) is not None
