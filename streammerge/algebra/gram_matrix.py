"""Gram matrices from their stored upper triangles, and the number of rows that are summed at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def full_matrices(pairs: NDArray[np.float64], n: int) -> NDArray[np.float64]:
    """Return the symmetric matrices, (rows, n, n), whose upper triangles are the rows of `pairs`."""
    rows, columns = np.triu_indices(n)
    matrices = np.empty((len(pairs), n, n))
    matrices[:, rows, columns] = pairs
    matrices[:, columns, rows] = pairs
    return matrices


def rows_at_once(n_columns: int) -> int:
    """Return the number of rows whose products are summed before they are added to the running sum.

    It depends on the shape only, and cuts lie at its multiples, so that sums do not depend on the cuts.
    """
    return max(1, min(64, (1 << 20) // n_columns))
