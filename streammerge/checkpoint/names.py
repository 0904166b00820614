"""Output heads that share the embedding's weights, as most small language models have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.naming import LANGUAGE_PARTS, TIED

_HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "shared.weight",
)


def is_head(name: str) -> bool:
    """Return whether a tensor is an output head, by its name."""
    return any(name == head or name.endswith(f".{head}") for head in _HEADS)


def tied_to(index: TensorIndex, head: str) -> str | None:
    """Return the embedding whose weights serve as a head that the model does not store; None if there is none.

    A model that stores no head and does not say that it has one of its own is tied: `transformers` would read it so.
    """
    if not is_head(head) or head in index or flag_of(index.config) is False:
        return None
    found = [name for name in index if name.endswith(EMBEDDINGS) and len(index[name].shape) == 2]
    return found[0] if len(found) == 1 else None


def flag_of(config: Mapping[str, Any]) -> bool | None:
    """Return what a model's config says of tied embeddings, itself or for its language model; None: nothing."""
    nested = [value for key, value in config.items() if key in LANGUAGE_PARTS]
    for part in (config, *(part for part in nested if isinstance(part, dict))):
        if isinstance(part.get(TIED), bool):
            return bool(part[TIED])
    return None
