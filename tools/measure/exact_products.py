"""
Time matrix products whose bits no BLAS can change, next to plain ones, and show which bits change.

    python tools/measure/exact_products.py [--sides 2048 4096] [--threads 1 2]

Ozaki's scheme: operands are cut to slices of b = (53 - log2 k) / 2 - 1 bits, whose fp64 products are exact in any order, and the
products of slices are added in one order. Run it with OPENBLAS_CORETYPE=Haswell and =SkylakeX, or MKL_ENABLE_INSTRUCTIONS=AVX2,
to see another CPU's bits.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

Matrix = NDArray[np.float64]
Product = Callable[[Matrix, Matrix], Matrix]


def by_torch(a: Matrix, b: Matrix) -> Matrix:
    """Return the product by torch's BLAS."""
    product: Matrix = (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()
    return product


def sliced(matrix: Matrix, bits: int, axis: int, count: int) -> tuple[NDArray[np.int32], list[Matrix]]:
    """Return an exponent per row (axis 1) or column (axis 0), and slices of integers, the highest bits first."""
    largest = np.abs(matrix).max(axis=axis, keepdims=True)
    exponents = np.where(largest > 0, np.frexp(largest)[1], 0)
    rest, slices = np.ldexp(matrix, -exponents), []
    for _ in range(count):
        rest = rest * 2.0**bits
        slices.append(np.rint(rest))
        rest -= slices[-1]
    return exponents, slices


def exact(a: Matrix, b: Matrix, count: int, product: Product) -> Matrix:
    """Return the product by `count` slices of each operand, the small ones first."""
    bits = (53 - math.ceil(math.log2(a.shape[1]))) // 2 - 1
    (of_a, left), (of_b, right) = sliced(a, bits, 1, count), sliced(b, bits, 0, count)
    total = np.zeros((a.shape[0], b.shape[1]))
    for both in range(count)[::-1]:
        for i in range(both + 1):
            total += product(left[i], right[both - i]) * 2.0 ** (-bits * (both + 2))
    return np.ldexp(total, of_a + of_b)


def timed(compute: Callable[[], Matrix]) -> tuple[Matrix, float]:
    """Return a result and the CPU seconds it took."""
    began = time.process_time()
    return compute(), time.process_time() - began


def digest(matrix: Matrix) -> str:
    """Return a few digits that differ if any bit does."""
    return hashlib.sha256(matrix.tobytes()).hexdigest()[:8]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[2048])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    for n in given.sides:
        spread = rng.standard_normal((n, n)) * np.exp2(rng.integers(-6, 1, (n, n)))
        a: Matrix = spread.astype(np.float32).astype(np.float64)
        b: Matrix = rng.standard_normal((n, n)).astype(np.float32).astype(np.float64)
        order = rng.permutation(n)
        turned = np.ascontiguousarray(a[:, order]), np.ascontiguousarray(b[order])
        for threads in given.threads:
            torch.set_num_threads(threads)
            for name, product in (("numpy", np.matmul), ("torch", by_torch)):
                with threadpool_limits(threads, "blas"):
                    product(a[:256], b)
                    plain, seconds = timed(partial(product, a, b))
                    same = (product(*turned) == plain).mean()
                    shown = (
                        f"plain {seconds:.2f} s of CPU, bits {digest(plain)}, {same:.1%} equal if permuted"
                    )
                    print(f"{n} {name} {threads} threads: {shown}", flush=True)
                    for count in (2, 3):
                        found, took = timed(partial(exact, a, b, count, product))
                        same = (exact(*turned, count, product) == found).mean()
                        apart = np.abs(found - plain).max() / np.abs(plain).max()
                        shown = f"bits {digest(found)}, {same:.1%} equal if permuted, {apart:.0e} apart"
                        print(f"  {count} slices {took / seconds:.1f} x, {shown}", flush=True)


if __name__ == "__main__":
    main()
