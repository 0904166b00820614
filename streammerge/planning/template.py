"""The model that an output is like."""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.checkpoint.index import TensorIndex


def template_of(models: Sequence[TensorIndex], base: TensorIndex | None) -> TensorIndex:
    """Return the base; without one the first model that has a config.json, or the first where none has."""
    return base if base is not None else next((model for model in models if model.config), models[0])
