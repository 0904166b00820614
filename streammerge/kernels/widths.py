"""The size of an element of each code."""

from streammerge.kernels import njit
from streammerge.kernels.operands import F32


@njit(nogil=True)
def width_of(code):
    """Return the size of an element in bytes."""
    return 4 if code == F32 else 2
