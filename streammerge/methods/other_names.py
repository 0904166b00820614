"""Names that papers, other tools and people give to methods, and what to say to one that is unknown."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_OTHER_NAMES = {
    "average": "linear",
    "averaging": "linear",
    "mean": "linear",
    "avg": "linear",
    "soup": "linear",
    "model_soup": "linear",
    "weighted_average": "linear",
    "weighted_sum": "linear",
    "lerp": "linear",
    "add_difference": "task_arithmetic",
    "task_vector": "task_arithmetic",
    "task_vectors": "task_arithmetic",
    "negation": "task_arithmetic",
    "ties_merging": "ties",
    "dare": "dare_ties",
    "magprune": "della",
    "fisher_merging": "fisher",
    "copy": "passthrough",
    "stack": "passthrough",
    "frankenmerge": "passthrough",
    "nuslerp_flatten": "nuslerp",
    "stock": "model_stock",
}


def method_meant(name: str, known: Iterable[str]) -> str:
    """Return the cure for the name of no method: the one that is meant, or where to find one."""
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")[:80]
    if plain in _OTHER_NAMES:
        return f"did you mean {_OTHER_NAMES[plain]!r}?"
    close = get_close_matches(plain, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return "`streammerge methods` lists them; a method of your own needs --methods FILE"
