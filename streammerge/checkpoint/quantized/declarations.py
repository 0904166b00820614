"""A model's declaration of its quantisation: in config.json, in a part of it, or in a file next to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any

from streammerge.checkpoint.names import LANGUAGE_PARTS
from streammerge.records import dataclass

DECLARATIONS = ("quantization_config", "compression_config")
"""Entries of config.json that declare how weights are quantised."""
EXPERT_DTYPE = "expert_dtype"
"""DeepSeek-V4's entry for the experts, whose format may differ from the other weights'."""


@dataclass(frozen=True)
class Declaration:
    """One declared quantisation."""

    method: str | None
    """The value of ``quant_method``; None if not declared."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The content of the entry."""
    where: str = "config.json"
    """The file of the declaration, for messages."""
    expert_dtype: str | None = None

    def block(self) -> tuple[int, int] | None:
        """Return the rows and columns of a block that shares a scale; None if not declared."""
        value = self.settings.get("weight_block_size")
        if isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value):
            return value[0], value[1]
        return None


NOTHING = Declaration(None)
"""The declaration of a model that declares nothing; its codes are recognised by names and dtypes alone."""


def declaration_of(config: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> Declaration:
    """Return a model's declaration; if there are several, the outermost entry.

    Parameters
    ----------
    config
        The content of config.json.
    beside
        The content of hf_quant_config.json; None if there is none.
    """
    expert_dtype = next(_expert_dtypes(config), None)
    for where, entry in _entries(config):
        method = entry.get("quant_method")
        known = method.lower() if isinstance(method, str) else None
        if known is None and "quant_algo" in entry:
            known = "modelopt"
        return Declaration(known, entry, f"config.json: {where}", expert_dtype)
    if beside is not None:
        inner = beside.get("quantization")
        return Declaration("modelopt", inner if isinstance(inner, Mapping) else {}, "hf_quant_config.json")
    if expert_dtype is not None:
        return Declaration("fp8", {}, f"config.json: {EXPERT_DTYPE}", expert_dtype)
    return NOTHING


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for part in ("", *LANGUAGE_PARTS):
        settings = config if not part else config.get(part)
        for key in DECLARATIONS:
            if isinstance(settings, Mapping) and isinstance(settings.get(key), Mapping):
                yield f"{part}.{key}".lstrip("."), settings[key]


def _expert_dtypes(config: Mapping[str, Any]) -> Iterator[str]:
    parts = [
        config,
        *(config.get(part) for part in LANGUAGE_PARTS),
        *(entry for _, entry in _entries(config)),
    ]
    for part in parts:
        if isinstance(part, Mapping) and isinstance(part.get(EXPERT_DTYPE), str):
            yield part[EXPERT_DTYPE].lower()
