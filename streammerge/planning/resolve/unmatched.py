"""Find filters and `exclude` patterns that match no tensor: misspelt, or for modules that these models lack."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise

from streammerge.config.schema import MergeConfig
from streammerge.config.wording import child, meant, shown
from streammerge.lazy import late_pattern
from streammerge.planning.resolve.assemble import Indexes, OutputTensor

_PLAIN = late_pattern(r"[\w.]+")
_MOST = 200
"""Most filters, and most patterns, that are checked."""


def unmatched(config: MergeConfig, outputs: Sequence[OutputTensor], indexes: Indexes) -> list[str]:
    """Return warnings; they are not errors, since published configs have filters for modules that only some models have."""
    names = {output.name for output in outputs}
    names |= {name for output in outputs for name in output.sources if name not in names}
    texts = _filters(config)
    lost = {
        text: path for text, path in islice(texts.items(), _MOST) if not any(text in name for name in names)
    }
    stored = names.union(*(index for index in indexes.values())) if config.exclude else names
    patterns = [
        (place, text)
        for place, text in enumerate(config.exclude[:_MOST])
        if not any(re.search(text, name) for name in stored)
    ]
    if not lost and not patterns:
        return []
    parts = _parts_of(stored)
    return [
        *(
            f"{path}: filter {shown(text)} is in no tensor's name{meant(text, parts)}"
            for text, path in lost.items()
        ),
        *(
            f"{child(f'{config.where}:', 'exclude')}[{place}]: {shown(text)} matches no tensor{_tensor_meant(text, parts)}"
            for place, text in patterns
        ),
    ]


def _filters(config: MergeConfig) -> dict[str, str]:
    """Return every filter of the config, with the place of its first use."""
    found: dict[str, str] = {}
    for settings, _ in config.settings():
        for setting in settings.values():
            for clause in setting.clauses:
                if clause.filter is not None and clause.filter != "*":
                    found.setdefault(clause.filter, setting.path)
    return found


def _parts_of(names: set[str]) -> Mapping[str, str]:
    """Return the words in tensors' names, each with the first tensor that contains it."""
    parts: dict[str, str] = {}
    for name in sorted(names):
        words = [word for word in name.split(".") if not word.isdigit()]
        for word in [*words, *(".".join(pair) for pair in pairwise(words)), name]:
            parts.setdefault(word, name)
    return parts


def _tensor_meant(text: str, parts: Mapping[str, str]) -> str:
    """Return a suggestion for a pattern, found by its longest literal part."""
    words = sorted(_PLAIN.findall(text.replace("\\.", ".")), key=len, reverse=True)
    return next((hint for word in words[:3] if (hint := meant(word.strip("."), parts.keys(), parts))), "")
