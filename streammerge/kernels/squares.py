"""The fused loop of Fisher estimation: squares of a gradient, summed in fp64."""

import numpy as np

from streammerge.kernels import njit


@njit(nogil=True)
def add_squares(sums, values):
    """Add the square of every value to its sum; see `estimate.fisher.squares`.

    ======  ============  ============================================
    sums    float64 (n,)  added to
    values  float32 (n,)  a gradient
    ======  ============  ============================================
    """
    for i in range(values.size):
        wide = np.float64(values[i])
        sums[i] += wide * wide
