"""Fused CPU loops over one piece of every model, compiled by numba; no Python object inside.

Each kernel is bit-equal to the torch formula of the rule it serves (``tests/kernels/test_kernels.py``):
no fast-math, no FMA contraction, one rounding at the end. Input and output regions are byte
offsets into one arena, so any number of models of any float dtype shares one compiled loop.
"""

from streammerge.numerics.jit import njit

__all__ = ["njit"]
