"""Output heads tied to the embedding, with adapters that train only one of the two."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from streammerge.checkpoint.adapters.files import Adapter
from streammerge.checkpoint.names import HEADS, LANGUAGE_PARTS, TIED, is_embedding, is_head
from streammerge.formats.refs import SourceRef
from streammerge.io.files import bad, quoted

_WITH_HEADS = ("CausalLM", "LMHeadModel", "ConditionalGeneration", "ImageTextToText")
"""Endings of architectures that have a head, tied or not."""
_SCALED = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "udop", "pop2piano")
"""Models that scale the input of a tied head, so that it cannot be untied without a change."""


def is_tied(config: Mapping[str, Any], names: Mapping[str, SourceRef], *, asked: bool = False) -> bool:
    """Return whether a model's head is its embedding.

    This is so if config.json says it, or does not mention it and the model stores no head, as in `transformers`.

    Parameters
    ----------
    asked
        Whether the adapter has factors of a head, so that there is one whatever the architecture's name.
    """
    flag = next((part[TIED] for part in _parts(config) if isinstance(part.get(TIED), bool)), None)
    architectures = config.get("architectures")
    names_of = [str(name) for name in architectures] if isinstance(architectures, list) else []
    known = any(name.endswith(_WITH_HEADS) for name in names_of)
    if flag is True:
        return asked or known or not names_of
    return flag is None and not any(map(is_head, names)) and (asked or known)


def renamed(ref: SourceRef, name: str) -> SourceRef:
    """Return the same tensor under the given name."""
    return ref.renamed(name)


def shared_heads(adapter: Adapter) -> set[str]:
    """Return the heads that share trained tokens with the embedding; PEFT trains them as one in tied models."""
    settings = adapter.settings
    of_embeddings = [
        settings.token_indices(module) for module in adapter.tokens if is_embedding(f"{module}.weight")
    ]
    return {
        module
        for module in adapter.tokens
        if is_head(f"{module}.weight") and settings.token_indices(module) in of_embeddings
    }


def settle_vocabulary(
    adapter: Adapter,
    base: Mapping[str, SourceRef],
    tensors: Mapping[str, SourceRef],
    config: Mapping[str, Any],
) -> tuple[dict[str, SourceRef], dict[str, Any], tuple[str, ...]]:
    """Return a model's tensors, settings and notes after an adapter that changes the embedding or the head.

    If the adapter changes only one of two tied tensors, they are untied, as in training: the other stays the base's.
    They stay tied if single tokens of the embedding were trained, and with ``ensure_weight_tying``. The size of the
    vocabulary follows the embedding.

    Raises
    ------
    ModelError
        If the adapter unties a head that cannot be untied.
    """
    found, settings = dict(tensors), copy.deepcopy(dict(config))
    parts = _parts(settings)
    embeddings = [name for name in base if is_embedding(name) and found[name] is not base[name]]
    notes = _part(adapter, base, found, settings) if is_tied(config, base, asked=_asks(adapter)) else ()
    for name in embeddings:
        before, after = base[name].shape[0], found[name].shape[0]
        for part in parts:
            if before != after and part.get("vocab_size") == before:
                part["vocab_size"] = after
    return found, settings, notes


def _part(
    adapter: Adapter, base: Mapping[str, SourceRef], found: dict[str, SourceRef], settings: dict[str, Any]
) -> tuple[str, ...]:
    """Store the head of a tied model separately if the adapter changed only one of the two; return notes."""
    shared = shared_heads(adapter)
    own_tokens = any(is_head(f"{module}.weight") for module in adapter.tokens if module not in shared)
    changed = [name for name in base if is_embedding(name) and found[name] is not base[name]]
    trained = [name for name in changed if not found[name].is_patched]
    heads = [name for name in found if is_head(name) and (name not in base or found[name] is not base[name])]
    own = [name for name in heads if own_tokens or not found[name].is_patched]
    stored = [name for name in found if is_head(name)]
    if trained and adapter.settings.flag("ensure_weight_tying"):
        for name in stored:
            found.pop(name)
        return ()
    if trained and not stored:
        embedding = trained[0]
        if found[embedding].shape != base[embedding].shape:
            return ()  # the head has the new size too, and the base has no head of that size
        stored = [HEADS[0]]
        found[HEADS[0]] = renamed(base[embedding], HEADS[0])
    elif not trained and not own:
        for name in [name for name in stored if name not in base]:
            found.pop(name)  # the same rows as the embedding's
        return ()
    if settings.get("model_type") in _SCALED:
        raise bad(
            str(adapter.directory),
            f"the adapter changes the head or the embedding alone, and {settings['model_type']} scales what a "
            "tied head is given: untying it would change the model; merge it with PEFT first",
        )
    for part in _parts(settings):
        if part is settings or TIED in part:
            part[TIED] = False
    how = "brings a head of its own" if own else "changes the embedding alone"
    return (
        f"{quoted(stored[0])}: the base ties its head to the embedding, and the adapter {how}: the output stores its head by "
        f"itself, and {TIED} is false in its config.json",
    )


def _asks(adapter: Adapter) -> bool:
    """Return whether an adapter changes a head, so that there is one."""
    return any(is_head(f"{module}.weight") for module in (*adapter.modules, *adapter.tokens)) or any(
        map(is_head, adapter.replaced)
    )


def _parts(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of the language model: a config, and its parts for a model within a larger one."""
    nested = [part for key, part in config.items() if key in LANGUAGE_PARTS and isinstance(part, dict)]
    return [config if isinstance(config, dict) else dict(config), *nested]
