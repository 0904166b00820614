"""Fused CPU loops over a block of every model, compiled by numba without Python objects.

Each kernel returns the bits of the torch formula of its rule (``tests/kernels/test_kernels.py``): no fast-math, no FMA
contraction (a fused multiply-add is written out where a proof needs it), one rounding at the end. Inputs and output are
byte offsets into one buffer, so one compiled loop serves any number of models of any float dtype.
"""

from typing import Any

from streammerge.numerics.jit import njit

__all__ = ["loop", "njit"]


def loop(**options: Any) -> Any:
    """Compile a function that allocates nothing, without counts of references to arrays.

    numba counts each slice, each row and each array that a function is called with, by atomic additions, which take as
    long as a hundred elements. So a kernel allocates its buffers, and a loop that it calls does the work: whoever
    calls holds the arrays meanwhile.
    """
    return njit(nogil=True, _nrt=False, **options)
