"""How task vectors agree in sign, from those that `deltas.survivors` has left."""

import numpy as np

from streammerge.kernels import loop, njit
from streammerge.kernels.blocks import BLOCK


@njit(nogil=True)
def count_agreements(deltas, counts):
    """Count the elements where two vectors or more are not zero: those of one sign, and those of both.

    ======  ==============  ============================================
    deltas  float32 (k, n)  the surviving task vectors of a tile
    counts  int64 (2,)      added to: elements that agree, that conflict
    ======  ==============  ============================================
    """
    _count_agreements(deltas, counts, np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32))


@loop()
def _count_agreements(deltas, counts, ups, downs):
    k, n = deltas.shape
    for start in range(0, n, BLOCK):
        m = min(BLOCK, n - start)
        ups[:] = 0
        downs[:] = 0
        for vector in range(k):
            entries = deltas[vector, start : start + m]
            for i in range(m):
                ups[i] += entries[i] > np.float32(0.0)
                downs[i] += entries[i] < np.float32(0.0)
        agree, conflict = 0, 0
        for i in range(m):
            both = (ups[i] > 0) & (downs[i] > 0)
            conflict += both
            agree += (ups[i] + downs[i] > 1) & (not both)
        counts[0] += agree
        counts[1] += conflict
