"""Parameter competition (PCB-Merging, https://arxiv.org/abs/2410.02396): the score of each entry of each task vector.

With a_i = abs(delta_i) clamped to [low_i, high_i] and c_i = sign(delta_i) a_i, for T models::

    intra_i = exp(T (n_i^2 - 1)),  n_i = (a_i - low_i) / (high_i - low_i)
    inter_i = tanh(c_i * sum_j c_j)
    b_i     = intra_i * inter_i, rounded to fp32

The published code has exp(T n_i^2); the factor exp(-T) changes no result, since scores are only compared with the scores of the
same model, and keeps them in [-1, 1]. exp and tanh consist of IEEE additions, multiplications and divisions, so torch and the
loops of ``kernels/competition.py`` give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from streammerge.algebra.scores import Score, patterns_of
from streammerge.algebra.task_vectors import TaskVector, Where
from streammerge.numerics.elementary import exp
from streammerge.numerics.finite import UNKNOWN
from streammerge.records import dataclass

if TYPE_CHECKING:
    import torch

_ZERO = 0x3F800000
"""The pattern of a score of 0. That of a positive score is above it by the score's bits, that of a negative one below."""
SMALL = 2.0**-6
"""Arguments of tanh below which its series is more accurate."""

Range = tuple[float, float]
"""The clamp of one model's magnitudes: (lowest, highest)."""


@dataclass(frozen=True)
class Size(Score):
    """The magnitude of a weighted task vector's entries."""

    vector: TaskVector

    def patterns(self, models: Sequence[torch.Tensor], base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return the magnitude's pattern of each element, int32."""
        return patterns_of(self.vector.entries(models[self.vector.model], base, where).abs())


@dataclass(frozen=True)
class Competition(Score):
    """The score b of one of several task vectors. Patterns order as scores do, negative ones included."""

    vectors: tuple[TaskVector, ...]
    ranges: tuple[Range, ...]
    place: int
    """Index of the task vector that is scored."""

    def patterns(self, models: Sequence[torch.Tensor], base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return the score's pattern of each element, int32."""
        import torch

        entries = [v.entries(models[v.model], base, where) for v in self.vectors]
        held = [clamped(one, span) for one, span in zip(entries, self.ranges, strict=True)]
        total = sum(held[1:], start=0.0 + held[0])
        bits = score(held[self.place], total, self.ranges[self.place], len(held)).view(torch.int32)
        sizes = bits & 0x7FFFFFFF
        return torch.where(torch.isfinite(total), _ZERO + torch.where(bits < 0, -sizes, sizes), UNKNOWN)


def value_of(pattern: int) -> float:
    """Return the score that a pattern of `Competition` stands for."""
    import numpy as np

    size = float(np.array(abs(pattern - _ZERO), np.int32).view(np.float32))
    return size if pattern >= _ZERO else -size


def clamped(entries: torch.Tensor, span: Range) -> torch.Tensor:
    """Return entries with their magnitude clamped; non-finite ones stay as they are, and 0 stays 0."""
    import torch

    held = entries.sign() * entries.abs().clamp(*span)
    return torch.where(torch.isfinite(entries), held, entries)


def score(held: torch.Tensor, total: torch.Tensor, span: Range, n_models: int) -> torch.Tensor:
    """Return the fp32 score of clamped entries, given the sum of all models' clamped entries."""
    low, high = span
    share = (held.abs().clamp(min=low) - low) / (high - low) if high > low else 0.0 * held
    return (exp(n_models * (share * share - 1.0)) * _tanh(held * total)).float()


def _tanh(x: torch.Tensor) -> torch.Tensor:
    import torch

    size, square = x.abs(), x * x
    near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0))))
    fall = exp(-2.0 * size)
    far = x.sign() * ((1.0 - fall) / (1.0 + fall))
    return torch.where(size < SMALL, near, far)
