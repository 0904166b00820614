"""Fused CPU loops over a block of every model, compiled by numba without Python objects.

Each kernel returns the bits of the torch formula of its rule (``tests/kernels/test_kernels.py``): no fast-math,
no FMA contraction, one rounding at the end. Inputs and output are byte offsets into one buffer, so one compiled
loop serves any number of models of any float dtype.
"""

from streammerge.numerics.jit import njit

__all__ = ["njit"]
