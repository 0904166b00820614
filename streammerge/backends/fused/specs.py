"""The shipped kernels: their table, written when they are compiled, and their PTX."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

from streammerge.backends.fused.launcher import KernelSpec

_FOLDER = files("streammerge.backends.fused") / "ptx"
TABLE = "kernels.json"


@cache
def kernel_specs() -> dict[str, KernelSpec]:
    """Return the shipped kernels by name."""
    table = json.loads((_FOLDER / TABLE).read_text())
    return {
        name: KernelSpec(name, signature=tuple(entry.pop("signature")), **entry)
        for name, entry in table["kernels"].items()
    }


def ptx(spec: KernelSpec) -> str:
    """Return the PTX of a kernel, for compute capability 7.5 and newer."""
    return (_FOLDER / spec.file).read_text()
