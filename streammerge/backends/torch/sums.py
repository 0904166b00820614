"""Sums of products in torch, equal to the kernels' bit for bit: fixed runs of elements, each in one order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.rules import Inputs
from streammerge.algebra.task_vectors import TaskVector, terms_of
from streammerge.numerics.ordered_sum import block_sums

if TYPE_CHECKING:
    import torch


def finite(values: torch.Tensor) -> torch.Tensor:
    """Return values with 0 in place of non-finite ones, which are left out of sums."""
    return values.masked_fill(~values.isfinite(), 0.0)


def factors(vectors: Sequence[TaskVector], inputs: Inputs) -> list[torch.Tensor]:
    """Return the vectors whose products are summed, fp64, with 0 in place of non-finite values."""
    terms = [finite(term).double() for term in terms_of(vectors, inputs.models, inputs.base, inputs.where)]
    for i, vector in enumerate(vectors):
        terms[i] = vector.rescale * terms[i]
    return terms


def dot_products(vectors: Sequence[TaskVector], inputs: Inputs, length: int) -> NDArray[np.float64]:
    """Return the dot products of all pairs over every `length` elements, (groups, pairs)."""
    terms = factors(vectors, inputs)
    pairs = [terms[i] * terms[j] for i in range(len(terms)) for j in range(i, len(terms))]
    return np.stack([block_sums(pair.flatten().cpu().numpy(), length) for pair in pairs], axis=1)


def products_of_rows(
    vectors: Sequence[TaskVector], inputs: Inputs, columns: int, before: int, at_once: int
) -> tuple[NDArray[np.float64], ...]:
    """Return the products of all pairs of rows, to be added one after the other, each (pairs, rows, columns).

    Runs of `at_once` rows are counted from the first row of the block, which is `before` rows before these. Whole runs
    are summed. Rows that end an earlier run, and rows that begin an incomplete one, are returned unsummed.

    Returns
    -------
    tuple
        The rows before, the sums of runs, and the rows after.
    """
    rows = [term.reshape(-1, columns) for term in factors(vectors, inputs)]
    first = min(len(rows[0]), -before % at_once)
    last = first + (len(rows[0]) - first) // at_once * at_once
    pairs = [(x, y) for i, x in enumerate(rows) for y in rows[i:]]
    return (
        _stacked([x[:first] * y[:first] for x, y in pairs]),
        _stacked([_sums_of_rows(x[first:last], y[first:last], at_once) for x, y in pairs]),
        _stacked([x[last:] * y[last:] for x, y in pairs]),
    )


def _stacked(tensors: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    import torch

    stacked: NDArray[np.float64] = torch.stack(list(tensors)).cpu().numpy()
    return stacked


def _sums_of_rows(x: torch.Tensor, y: torch.Tensor, at_once: int) -> torch.Tensor:
    """Return the sums of products over each run of `at_once` rows, row after row, (runs, columns)."""
    x, y = (rows.reshape(-1, at_once, rows.shape[1]) for rows in (x, y))
    total = x.new_zeros(x.shape[0], x.shape[2])
    for row in range(at_once):
        total = total + x[:, row] * y[:, row]
    return total
