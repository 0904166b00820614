"""The memory that an estimate needs, stage by stage: numbers in, numbers out.

Estimates err on the large side; a test holds the measured peak below them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from streammerge.errors import BudgetError
from streammerge.planning.memory.budget import MIB, make_budget
from streammerge.units import format_size

RESERVE = 480 * MIB
"""Interpreter, torch, transformers and the kernels, and what the store needs to write an array."""
_WEIGHT, _SUM, _ACTIVATION = 4, 8, 4
_KEPT = 3
"""Activations of a linear map's width that are alive at once: kept for the way back, its gradient, a copy on the way."""
_ATTENTION = 4
"""Matrices of tokens by tokens for each head, where attention is not fused."""
_LOGITS = 6
"""Matrices of tokens by vocabulary: logits, scores, what is between them, and copies on the way."""
_SPREAD = 1.1
"""Bytes that an allocator holds in addition to what is asked for."""


@dataclass(frozen=True)
class StageSize:
    """One stage, in elements where nothing else is said."""

    name: str
    weights: int
    """Parameters that are resident, with their sums."""
    whole: int = 0
    """Those among them whose gradients autograd forms whole."""
    row_sums: int = 0
    """Sums of the rows of embeddings that are looked up."""
    activations: int = 0
    """Most that the longest example has alive at once."""

    @property
    def nbytes(self) -> int:
        """Bytes beside the process's own."""
        held = self.weights * (_WEIGHT + _SUM) + self.whole * 2 * _WEIGHT + self.row_sums * 2 * _SUM
        return math.ceil(_SPREAD * (held + self.activations * _ACTIVATION))


def layer_activations(shapes: Iterable[Sequence[int]], tokens: int, width: int, heads: int, used: int) -> int:
    """Return the activations of a layer, from the shapes of its weights.

    Parameters
    ----------
    used
        Experts that a token goes through, where a weight holds several (its first of three axes).
    """
    linear = sum(sum(shape[-2:]) * (used if len(shape) > 2 else 1) for shape in shapes if len(shape) > 1)
    return tokens * (_KEPT * linear + 16 * width) + _ATTENTION * heads * tokens * tokens


def head_activations(tokens: int, choices: int, width: int) -> int:
    """Return the activations of what follows the layers; `choices` is the vocabulary, or the labels."""
    return tokens * (_LOGITS * choices + 16 * width)


def boundary_elements(batch_size: int, tokens: int, width: int, n_scores: int) -> int:
    """Return what is held of the files that pass between stages: two read, one or two written."""
    return batch_size * tokens * width * (2 + 3 * n_scores)


def check_fits(memory: int | None, stages: Sequence[StageSize], between: int) -> int:
    """Return the bytes that the largest stage brings the process to.

    Parameters
    ----------
    between
        Elements held of the files between stages.

    Raises
    ------
    BudgetError
        If that is more than `memory`, by default half of what is free.
    """
    total = make_budget(memory, 1, RESERVE).total
    largest = max(stages, key=lambda stage: stage.nbytes)
    needed = RESERVE + largest.nbytes + between * _ACTIVATION
    if needed > total:
        raise BudgetError(
            f"{largest.name} needs {format_size(needed)}: {format_size(RESERVE)} for the process, "
            f"{format_size(largest.weights * (_WEIGHT + _SUM))} for {largest.weights:,} weights and their sums, "
            f"{format_size(largest.activations * _ACTIVATION)} for the longest example; --memory is {format_size(total)}: "
            "raise it, or lower --max-length or --batch-size"
        )
    return needed
