"""Fused CPU loops over one piece of every model, compiled by numba; no Python object inside.

Each kernel is bit-equal to the torch formula of the recipe it serves (``tests/test_kernels.py``):
no fast-math, no FMA contraction, one rounding at the end. Input and output regions are byte
offsets into one arena, so any number of models of any float dtype shares one compiled loop.
"""

import hashlib
import os
from pathlib import Path

import numba


def _cache_directory() -> Path:
    """Return a directory named by the kernels' sources.

    numba renews a cached loop when its own file changes, not when a loop it calls does, which
    lies in another file here: an upgrade in place could run half-old code.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "streammerge" / f"kernels-{hashlib.blake2b(sources, digest_size=8).hexdigest()}"


if not numba.config.CACHE_DIR:
    numba.config.CACHE_DIR = str(_cache_directory())


def cache_directory() -> Path:
    """Return where the compiled kernels are kept."""
    return Path(numba.config.CACHE_DIR)
