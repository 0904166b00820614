"""Tensors that libraries make of others when they load a model, and that a file need not hold."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from streammerge.checkpoint.names import LANGUAGE_PARTS, TIED

_EMBEDDING = re.compile(
    r"(^|\.)(shared|wte|(tok|word|embed)_(embeddings?|tokens|in)|embedding|tokens_embed)\.weight$"
)
_TIED_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|proj_out|output_projection|vocab_projector|generator_lm_head|predictions\.decoder|"
    r"lm_head\.decoder)\.weight$"
)
_COPIES = (
    (re.compile(r"(^|\.)(encoder|decoder)\.embed_tokens\.weight$"), _EMBEDDING),
    (
        re.compile(r"(^|\.)(lm_head|predictions)\.decoder\.bias$"),
        re.compile(r"(^|\.)(lm_head|predictions)\.bias$"),
    ),
)
"""Names of copies, and of what they are copies of, whatever config.json says."""


def is_tied_copy(name: str, present: Collection[str], config: Mapping[str, Any]) -> bool:
    """Return whether a tensor is a copy of one that is `present`, by its name.

    An output head is one unless config.json says that it has weights of its own.

    >>> is_tied_copy("decoder.embed_tokens.weight", ["shared.weight"], {})
    True
    >>> is_tied_copy("lm_head.weight", ["model.embed_tokens.weight"], {"tie_word_embeddings": False})
    False
    """
    copies = [*_COPIES, *([(_TIED_HEAD, _EMBEDDING)] if says_tied(config) is not False else [])]
    return any(
        copy.search(name) and any(original.search(other) for other in present if other != name)
        for copy, original in copies
    )


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """Return what a model's config says of tied embeddings, itself or for its language model; None: nothing."""
    nested = [value for key, value in config.items() if key in LANGUAGE_PARTS]
    for part in (config, *(part for part in nested if isinstance(part, dict))):
        if isinstance(part.get(TIED), bool):
            return bool(part[TIED])
    return None
