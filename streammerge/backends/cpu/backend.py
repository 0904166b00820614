"""The backend of compiled kernels: fp32 and narrower, on the CPU."""

from __future__ import annotations

from streammerge.algebra.rules import Sees
from streammerge.backends.base import Backend, TensorFacts
from streammerge.backends.cpu.math import KernelMath, Loaded


def _workspace(tensor: TensorFacts, n: int, sees: Sees) -> int:
    """Return the bytes of temporaries: kernels have none but for sums over one row."""
    return 72 * tensor.row_length if sees == "rows" else 0


def _math(block: Loaded, device: str, sees: Sees) -> KernelMath:
    return KernelMath(block)


CPU = Backend("cpu", reserve=224 << 20, workspace=_workspace, math=_math, compiled=True, formulas=False)
"""The reserve: the interpreter, numpy, numba with its kernels compiled or loaded, and what threads need."""
