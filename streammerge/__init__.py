"""Merge neural-network checkpoints larger than memory: streaming, exact, reproducible, resumable.

Merge directories or names from the Hugging Face cache, from a YAML file or the same as a mapping::

    import streammerge

    config = {
        "merge_method": "ties",
        "base_model": "models/llama-base",
        "models": ["models/llama-math", "models/llama-code"],
        "parameters": {"density": 0.3, "lambda": 1.0},
        "dtype": "bfloat16",
    }
    print(streammerge.plan(config).summary())                       # from headers alone, nothing is written
    streammerge.merge(config, "merged", memory="4GiB")              # interrupted, the same call continues

or models in memory::

    merged = streammerge.merge_state_dicts(
        {"merge_method": "linear", "models": ["a", "b"], "parameters": {"weight": 0.5}},
        {"a": model_a, "b": model_b},                               # modules or state dicts
    )

Functions
---------
merge, plan, verify
    From a config to a finished directory; what would be done; whether it is still what was written.
sweep
    A merge for every combination of some parameters' values, from one read of the models.
extract_lora
    A model minus its base as a LoRA adapter.
merge_state_dicts, iter_merged
    The same formulas and bits for models in memory.
compare
    How models differ from their base and from each other.
inspect_model, list_methods
    A model's tensors; the methods and their parameters.
compute_fisher, import_fisher, compute_grams
    Fisher diagonals and Gram matrices, for the methods that weigh by them.
method, per_model
    Registers a method of your own; the default of its parameters that have a value per model.

Errors are `StreammergeError` and its kinds, warnings are `StreammergeWarning`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.lazy import importer
from streammerge.version import __version__ as __version__

if TYPE_CHECKING:
    from streammerge.api.checking import verify
    from streammerge.api.comparing import compare
    from streammerge.api.deciding import plan
    from streammerge.api.extracting import extract_lora
    from streammerge.api.in_memory import iter_merged, merge_state_dicts
    from streammerge.api.looking import inspect_model, list_methods
    from streammerge.api.merging import merge
    from streammerge.api.streaming import compute_fisher, compute_grams, import_fisher
    from streammerge.api.sweeping import Sweep, sweep
    from streammerge.engine.merge import Summary
    from streammerge.engine.telling import Density
    from streammerge.errors import (
        BudgetError,
        ConfigError,
        InputError,
        ModelError,
        OutputError,
        Stopped,
        StreammergeError,
        StreammergeWarning,
        WorldError,
    )
    from streammerge.events import Event
    from streammerge.methods.registry import Method, PerModel, method, per_model
    from streammerge.output.check import Verdict
    from streammerge.planning.plan import MergePlan

__all__ = [
    "BudgetError",
    "ConfigError",
    "Density",
    "Event",
    "InputError",
    "MergePlan",
    "Method",
    "ModelError",
    "OutputError",
    "PerModel",
    "Stopped",
    "StreammergeError",
    "StreammergeWarning",
    "Summary",
    "Sweep",
    "Verdict",
    "WorldError",
    "compare",
    "compute_fisher",
    "compute_grams",
    "extract_lora",
    "import_fisher",
    "inspect_model",
    "iter_merged",
    "list_methods",
    "merge",
    "merge_state_dicts",
    "method",
    "per_model",
    "plan",
    "sweep",
    "verify",
]

_HOMES = {
    "api.checking": ("verify",),
    "api.comparing": ("compare",),
    "api.deciding": ("plan",),
    "api.extracting": ("extract_lora",),
    "api.in_memory": ("iter_merged", "merge_state_dicts"),
    "api.looking": ("inspect_model", "list_methods"),
    "api.merging": ("merge",),
    "api.streaming": ("compute_fisher", "compute_grams", "import_fisher"),
    "api.sweeping": ("Sweep", "sweep"),
    "engine.merge": ("Summary",),
    "engine.telling": ("Density",),
    "errors": (
        "BudgetError",
        "ConfigError",
        "InputError",
        "ModelError",
        "OutputError",
        "Stopped",
        "StreammergeError",
        "StreammergeWarning",
        "WorldError",
    ),
    "events": ("Event",),
    "methods.registry": ("Method", "PerModel", "method", "per_model"),
    "output.check": ("Verdict",),
    "planning.plan": ("MergePlan",),
}
"""Where the public names live."""

__getattr__ = importer(__name__, _HOMES)


def __dir__() -> list[str]:
    """Name what is public, for Tab completion."""
    return sorted([*__all__, "__doc__", "__file__", "__name__", "__path__", "__version__"])
