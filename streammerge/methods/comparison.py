"""How fine-tunes differ from their base, tensor by tensor: rounds of statistics, as a method asks for them.

The engine runs `COMPARISON` and `REVIEW` like methods. No list of methods contains them, since they merge nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import WeightedSum
from streammerge.algebra.task_vectors import Cut, TaskVector
from streammerge.methods.drop import GENERAL
from streammerge.methods.parameters import drop_parameters
from streammerge.methods.registry import Method
from streammerge.methods.tensor_context import TensorContext
from streammerge.records import dataclass
from streammerge.statistics.asking import Steps, ask, ask_all, follow
from streammerge.statistics.kinds import (
    Directions,
    Gram,
    Magnitudes,
    Moves,
    OwnSquares,
    SignAgreement,
    SignCounts,
    Squares,
    Statistic,
    Threshold,
    TieIndex,
    TopK,
)

SHARES = (0.01, 0.05, 0.2)
"""Shares of a tensor's largest entries; the comparison computes their part of the squared norm."""
TOP = 0.2
"""The share of largest entries over which "top20" signs are counted."""


@dataclass(frozen=True)
class TensorDifference:
    """How the task vectors of one tensor differ from 0 and from each other; all of it is exact."""

    n: int
    """Elements of the tensor."""
    base_square: float
    """Sum of the base's squares."""
    dots: NDArray[np.float64]
    """Dot products of the task vectors, (vectors, vectors); their squared norms on the diagonal."""
    top_squares: NDArray[np.float64]
    """Sums of squares of each vector's largest entries, (vectors, `SHARES`)."""
    signs: SignCounts
    """Over all elements."""
    top_signs: SignCounts
    """Over each vector's `TOP` largest entries."""
    exponents: NDArray[np.int64]
    """Entries of each vector by fp32 exponent, (vectors, 256)."""


def difference(context: TensorContext) -> Steps[TensorDifference]:
    """Ask for everything about the task vectors of one tensor.

    Of equal magnitudes at a threshold those of lowest index count among the largest, as in `torch.sort(stable=True)`.
    """
    found, _ = yield from _difference_and(context, ())
    return found


def _difference_and(
    context: TensorContext, others: Sequence[Statistic[Any]]
) -> Steps[tuple[TensorDifference, list[Any]]]:
    """Ask for the difference and for other statistics, in as few rounds as there can be: a streamed tensor is read for each."""
    vectors = tuple(TaskVector(i) for i in range(context.n_models))
    asked = [(vector, share) for vector in vectors for share in SHARES]
    wanted: list[Statistic[Any]] = [
        OwnSquares(len(vectors) + 1),
        Gram(len(vectors), vectors),
        SignAgreement(vectors),
        *(Magnitudes(vector) for vector in vectors),
        *(TopK(vector, share) for vector, share in asked),
        *others,
    ]
    own, dots, signs, *more = yield from ask_all(wanted)
    exponents, more = more[: len(vectors)], more[len(vectors) :]
    thresholds: dict[tuple[TaskVector, float], Threshold] = dict(zip(asked, more, strict=False))
    above: list[Statistic[Any]] = [
        Squares(tuple(replace(v, cut=Cut(thresholds[v, share].key, "drop")) for v in vectors))
        for share in SHARES
    ]
    ends = (TieIndex(vector, thresholds[vector, TOP]) for vector in vectors)
    found = yield from ask_all([*above, *ends])
    strictly, places = found[: len(SHARES)], found[len(SHARES) :]
    kept = tuple(
        replace(vector, cut=Cut(thresholds[vector, TOP].key, "index", end))
        for vector, (_, end) in zip(vectors, places, strict=True)
    )
    top_signs = yield from ask(SignAgreement(kept))
    squares = np.array(
        [
            [
                sums.totals[i] + _of_ties(thresholds[vector, share])
                for share, sums in zip(SHARES, strictly, strict=True)
            ]
            for i, vector in enumerate(vectors)
        ]
    )
    difference = TensorDifference(
        context.n_elements,
        own.totals[0],
        dots.matrix()[0],
        squares,
        signs,
        top_signs,
        np.array(exponents, np.int64),
    )
    return difference, more[len(asked) :]


def _of_ties(threshold: Threshold) -> float:
    """Return the sum of squares of the entries at a threshold that count among the largest."""
    magnitude = float(np.uint32(threshold.key).view(np.float32))
    return threshold.needed * magnitude * magnitude


@dataclass(frozen=True)
class OutputDifference:
    """Where a merge's output lies: the last task vector is the output's; all of it is exact."""

    difference: TensorDifference
    with_model: tuple[SignCounts, ...]
    """For each model, over the elements where its task vector and the output's are both non-zero."""
    moves: Directions
    """The directions in which the output differs from the base."""


def output_difference(context: TensorContext) -> Steps[OutputDifference]:
    """Ask for everything about the task vectors of one tensor, and about the output's signs."""
    *models, output = (TaskVector(i) for i in range(context.n_models))
    wanted: list[Statistic[Any]] = [SignAgreement((model, output)) for model in models]
    found, (*agreements, moves) = yield from _difference_and(
        context, [*wanted, Moves(context.n_models, output.model)]
    )
    return OutputDifference(found, tuple(agreements), moves)


def _measured(steps: Callable[[TensorContext], Steps[Any]], name: str) -> Method:
    """Return the method that asks for statistics and has a rule that no one applies."""

    def ask_for(context: TensorContext) -> Steps[WeightedSum]:
        """Compare models with their base."""
        yield from steps(context)
        return WeightedSum((1.0,))

    parameters = {one.name: one for one in drop_parameters(GENERAL)}
    return Method(name, ask_for, Extent.TENSOR, "required", (1, None), parameters)


COMPARISON = _measured(difference, "compare")
REVIEW = _measured(output_difference, "report")
"""What `merge --report` measures: the models and the output, which is the last model."""


def difference_of(context: TensorContext, answers: Sequence[Sequence[Any]]) -> TensorDifference:
    """Return the differences in a tensor, given the values of all rounds of `COMPARISON`."""
    found = follow(difference(context), answers)
    assert isinstance(found, TensorDifference)
    return found


def output_difference_of(context: TensorContext, answers: Sequence[Sequence[Any]]) -> OutputDifference:
    """Return the differences in a tensor, given the values of all rounds of `REVIEW`."""
    found = follow(output_difference(context), answers)
    assert isinstance(found, OutputDifference)
    return found
