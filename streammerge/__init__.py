"""Merge neural-network checkpoints larger than memory: streaming, exact, reproducible, resumable."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from streammerge.api import compute_fisher, compute_grams, merge, plan, verify
    from streammerge.methods.registry import PerModel, method

__all__ = ["PerModel", "compute_fisher", "compute_grams", "merge", "method", "plan", "verify"]

_HOMES = {
    "compute_fisher": "streammerge.api",
    "compute_grams": "streammerge.api",
    "merge": "streammerge.api",
    "plan": "streammerge.api",
    "verify": "streammerge.api",
    "method": "streammerge.methods.registry",
    "PerModel": "streammerge.methods.registry",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used (PEP 562): `--help` needs none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'streammerge' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
