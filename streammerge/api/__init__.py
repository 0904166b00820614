"""The Python interface, used by the command line and by users."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.lazy import importer

if TYPE_CHECKING:
    from streammerge.api.checking import DEFAULT_SAMPLE, verify
    from streammerge.api.deciding import plan
    from streammerge.api.extracting import extract_lora
    from streammerge.api.in_memory import iter_merged, merge_state_dicts
    from streammerge.api.looking import inspect_model, list_methods
    from streammerge.api.merging import merge
    from streammerge.api.reading import ConfigLike
    from streammerge.api.streaming import compute_fisher, compute_grams, import_fisher
    from streammerge.api.sweeping import sweep
    from streammerge.planning.backend import choose_device
    from streammerge.planning.options import DEFAULT_SHARD_SIZE

__all__ = [
    "DEFAULT_SAMPLE",
    "DEFAULT_SHARD_SIZE",
    "ConfigLike",
    "choose_device",
    "compute_fisher",
    "compute_grams",
    "extract_lora",
    "import_fisher",
    "inspect_model",
    "iter_merged",
    "list_methods",
    "merge",
    "merge_state_dicts",
    "plan",
    "sweep",
    "verify",
]

_HOMES = {
    "api.checking": ("DEFAULT_SAMPLE", "verify"),
    "api.deciding": ("plan",),
    "api.extracting": ("extract_lora",),
    "api.in_memory": ("iter_merged", "merge_state_dicts"),
    "api.looking": ("inspect_model", "list_methods"),
    "api.merging": ("merge",),
    "api.reading": ("ConfigLike",),
    "api.streaming": ("compute_fisher", "compute_grams", "import_fisher"),
    "api.sweeping": ("sweep",),
    "planning.backend": ("choose_device",),
    "planning.options": ("DEFAULT_SHARD_SIZE",),
}
__getattr__ = importer(__name__, _HOMES)
