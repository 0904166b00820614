"""Scores by which methods select elements: computed in fp64, rounded to fp32, ranked by their bit patterns.

Patterns order as the scores do. A non-finite score ranks above all others, so that the element is selected and the
check on the output finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from streammerge.algebra.task_vectors import Cut, TaskVector, Where
from streammerge.numerics import elementary
from streammerge.numerics.finite import LARGEST, SMOOTHING, UNKNOWN
from streammerge.records import dataclass

if TYPE_CHECKING:
    import torch


class Ranked(Protocol):
    """The quantity that ranks elements: a task vector, by magnitude, or a score."""

    @property
    def sees_rows(self) -> bool:
        """Whether an element's pattern depends on all of its row."""

    @property
    def only_model(self) -> int | None:
        """The only model that it depends on; None: it may depend on all of them."""

    def patterns(self, models: Sequence[torch.Tensor], base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return the pattern of each element, int32."""


class Score:
    """A number by which elements are selected. A subclass is a frozen dataclass that defines `patterns`."""

    sees_rows = False
    only_model: int | None = None

    def patterns(self, models: Sequence[torch.Tensor], base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return the score's pattern of each element, int32."""
        raise NotImplementedError


@dataclass(frozen=True)
class Spread(Score):
    """The population variance of an element's task vectors over the models (SCE, https://arxiv.org/abs/2408.07990)."""

    vectors: tuple[TaskVector, ...]

    def patterns(self, models: Sequence[torch.Tensor], base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return the score's pattern of each element, int32."""
        entries = [v.rescale * v.surviving(models[v.model], base, where).double() for v in self.vectors]
        mean = total = base.new_zeros(base.shape).double()
        for entry in entries:
            mean = mean + entry
        mean = mean / len(entries)
        for entry in entries:
            apart = entry - mean
            total = total + apart * apart
        return patterns_of(total / len(entries))


@dataclass(frozen=True)
class Importance(Score):
    """abs(delta) times the divergence KL(theta || theta_0) of the softmaxes of the element's row (the last axis).

    Probabilities are smoothed by `SMOOTHING`. Non-finite elements are left out of their row's divergence.
    """

    vector: TaskVector

    sees_rows = True

    def patterns(self, models: Sequence[torch.Tensor], base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return the score's pattern of each element of whole rows, int32 and flat."""
        theta = models[self.vector.model]
        if self not in where.divergences:
            where.divergences[self] = self.divergence(theta, base, where)
        size = self.vector.surviving(theta, base, where).double().abs().reshape(-1, where.row_length)
        return patterns_of((size * where.divergences[self].unsqueeze(1)).reshape(-1))

    def divergence(self, theta: torch.Tensor, base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return the divergence of each row, fp64; values that rounding made negative become 0."""
        import torch

        after = self.vector.dropped_model(theta, base, where) if self.vector.removes else theta.double()
        x, y = (values.reshape(-1, where.row_length) for values in (after, base.double()))
        there = torch.isfinite(x) & torch.isfinite(y)
        p, q = _probabilities(x, there), _probabilities(y, there)
        terms = torch.where(there, p * elementary.log(p / q), 0.0)
        return elementary.lane_sums(terms).clamp(min=0.0)


@dataclass(frozen=True)
class Selection:
    """The elements whose score passes a cut; ties are all kept, all dropped, or kept by index."""

    score: Score
    cut: Cut

    def mask(self, models: Sequence[torch.Tensor], base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return the mask of the selected elements of the block."""
        import torch

        pattern = self.score.patterns(models, base, where)
        above = pattern > self.cut.key
        if self.cut.ties == "all":
            return above | (pattern == self.cut.key)
        if self.cut.ties == "drop":
            return above
        assert self.cut.ties == "index"
        place = torch.arange(where.start, where.start + pattern.numel(), device=pattern.device)
        return above | ((pattern == self.cut.key) & (place < self.cut.limit))


def _probabilities(rows: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Return the smoothed softmax of each row over the elements where `there` is True."""
    import torch

    top = rows.masked_fill(~there, -torch.inf).max(dim=1, keepdim=True).values
    powers = torch.where(there, elementary.exp(rows - torch.where(torch.isfinite(top), top, 0.0)), 0.0)
    total = elementary.lane_sums(powers).unsqueeze(1)
    return powers / torch.where(total == 0, 1.0, total) + SMOOTHING


def patterns_of(score: torch.Tensor) -> torch.Tensor:
    """Return the fp32 patterns of scores of 0 or more, int32; that of a non-finite one is above all others."""
    import torch

    patterns = score.clamp(max=LARGEST).float().view(torch.int32) & 0x7FFFFFFF
    return torch.where(torch.isfinite(score), patterns, UNKNOWN)
