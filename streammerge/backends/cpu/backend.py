"""The backend of compiled kernels: fp32 and narrower dtypes, on the CPU."""

from __future__ import annotations

from streammerge.algebra.block import Block
from streammerge.algebra.extent import Extent
from streammerge.backends.base import Backend, TensorFacts
from streammerge.backends.cpu.math import KernelMath
from streammerge.backends.cpu.registry import is_applied


def _workspace(tensor: TensorFacts, n: int, sees: Extent) -> int:
    """Return the bytes of temporaries; kernels need some only for sums over one row, and the survivors of each model in it."""
    return max(72, 24 + 8 * len(tensor.inputs)) * tensor.row_length if sees == Extent.ROW else 0


def _math(block: Block, device: str, sees: Extent) -> KernelMath:
    return KernelMath(block)


CPU = Backend(
    "cpu",
    reserve=224 << 20,
    workspace=_workspace,
    math=_math,
    compiled=True,
    settles=True,
    formulas=False,
    applies=is_applied,
)
"""The reserve: the interpreter, numpy, numba with its compiled or loaded kernels, and threads."""
