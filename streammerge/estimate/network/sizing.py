"""The memory that an estimate needs in each stage: numbers in, numbers out.

The numbers are upper bounds; a test checks that the measured peak stays below them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from streammerge.errors import BudgetError
from streammerge.planning.memory.budget import MIB, SMALLEST_CAPACITY, enough_budget, make_budget
from streammerge.records import dataclass
from streammerge.units import format_at_least, format_size

RESERVE = 480 * MIB
"""Bytes for the interpreter, torch, transformers, the kernels, and writing an array of the store."""
_WEIGHT, _SUM, _ACTIVATION = 4, 8, 4
_KEPT = 3
"""Number of live activations per linear map: one kept for the backward pass, its gradient, and a copy."""
_ATTENTION = 4
"""Number of [tokens, tokens] matrices per head if attention is not fused."""
_LOGITS = 6
"""Number of [tokens, vocabulary] matrices: logits, scores, intermediates and copies."""
_SPREAD = 1.1
"""Bytes that the allocator holds in addition to requested memory."""


@dataclass(frozen=True)
class StageSize:
    """The size of one stage, in elements unless stated otherwise."""

    name: str
    weights: int
    """Resident parameters, each with its sum."""
    whole: int = 0
    """Resident parameters whose whole gradients autograd computes."""
    row_sums: int = 0
    """Sums for looked-up rows of embeddings."""
    activations: int = 0
    """Most live activations of the longest example."""

    @property
    def nbytes(self) -> int:
        """Size in bytes, without the process's own memory."""
        held = self.weights * (_WEIGHT + _SUM) + self.whole * 2 * _WEIGHT + self.row_sums * 2 * _SUM
        return math.ceil(_SPREAD * (held + self.activations * _ACTIVATION))


def layer_activations(shapes: Iterable[Sequence[int]], tokens: int, width: int, heads: int, used: int) -> int:
    """Return the activations of a layer, from the shapes of its weights.

    Parameters
    ----------
    used
        Number of experts per token, for weights that hold several experts (the first of three axes).
    """
    linear = sum(sum(shape[-2:]) * (used if len(shape) > 2 else 1) for shape in shapes if len(shape) > 1)
    return tokens * (_KEPT * linear + 16 * width) + _ATTENTION * heads * tokens * tokens


def head_activations(tokens: int, choices: int, width: int) -> int:
    """Return the activations of the part after the layers; `choices` is the size of the vocabulary, or of the labels."""
    return tokens * (_LOGITS * choices + 16 * width)


def boundary_elements(batch_size: int, tokens: int, width: int, n_scores: int) -> int:
    """Return the elements held of the files between stages: two are read, one or two written."""
    return batch_size * tokens * width * (2 + 3 * n_scores)


def check_fits(memory: int | None, stages: Sequence[StageSize], between: int) -> int:
    """Return the process's bytes in the largest stage.

    Parameters
    ----------
    between
        Elements held of the files between stages.

    Raises
    ------
    BudgetError
        If they exceed `memory`, by default half of what is free.
    """
    largest = max(stages, key=lambda stage: stage.nbytes)
    needed = RESERVE + largest.nbytes + between * _ACTIVATION
    if needed <= RESERVE + SMALLEST_CAPACITY:
        enough_budget(memory, 1, RESERVE)
    elif needed > (total := make_budget(memory, 1, RESERVE).total):
        raise BudgetError(
            f"{largest.name} needs {format_size(needed)}: {format_size(RESERVE)} for the process, "
            f"{format_size(largest.weights * (_WEIGHT + _SUM))} for {largest.weights:,} weights and their sums, "
            f"{format_size(largest.activations * _ACTIVATION)} for the longest example; --memory is {format_size(total)}: "
            f"give at least {format_at_least(needed)}, or lower --max-length or --batch-size",
            needed,
        )
    return needed
