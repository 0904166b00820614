"""Kernels ask LLVM for its widest vectors, and count no references."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from streammerge.numerics.wide import WideCompiler


def _total(values: NDArray[np.float64]) -> float:
    total = 0.0
    for i in range(0, len(values), 2):
        total += values[i : i + 2][0]
    return total


def test_a_compiled_function_asks_for_wide_vectors_and_counts_no_references() -> None:
    compiled = numba.njit(pipeline_class=WideCompiler, _nrt=False)(_total)
    assert compiled(np.arange(8.0)) == 12.0
    (text,) = compiled.inspect_llvm().values()
    assert '"prefer-vector-width"="512"' in text
    assert "NRT_" not in text
