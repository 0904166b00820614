"""Other names of methods, from papers, tools and common use, and the suggestion for an unknown name."""

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
    "iso": "iso_c",
    "isotropic": "iso_c",
    "tsv": "tsv_m",
    "task_singular_vectors": "tsv_m",
    "wudi_merging": "wudi",
    "emr_merging": "emr",
    "pcb_merging": "pcb",
    "consensus_ta": "consensus",
    "consensus_task_arithmetic": "consensus",
    "tall_masks": "consensus",
    "singular_value_calibration": "svc",
}


def method_meant(name: str, known: Iterable[str]) -> str:
    """Return the cure for an unknown method name: the likely name, or where to find the list."""
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")[:80]
    if plain in _OTHER_NAMES:
        return f"did you mean {_OTHER_NAMES[plain]!r}?"
    close = get_close_matches(plain, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return "`streammerge methods` lists them; your own methods need --methods FILE"
