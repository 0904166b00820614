"""The template model, which the output resembles."""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.checkpoint.index import TensorIndex


def template_of(models: Sequence[TensorIndex], base: TensorIndex | None) -> TensorIndex:
    """Return the base. Without one, return the first model with a config.json, or the first model if none has one."""
    return base if base is not None else next((model for model in models if model.config), models[0])
