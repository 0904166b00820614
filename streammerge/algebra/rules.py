"""Rules: the arithmetic on every element once the statistics are known, as formulas in torch.

A rule is a frozen value. Called on fp32 blocks it is the reference implementation and the GPU path. The CPU backend
has a fused kernel for each built-in rule; tests hold it to the same bits. Sums over models run in fp64, in configured
order, with separate multiplication and addition; the fp64 result is rounded once, to the output's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streammerge.algebra.extent import Extent
from streammerge.algebra.scores import Selection, sees_rows
from streammerge.algebra.task_vectors import TaskVector, Where, terms_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Coefficients = Callable[[NDArray[np.float64]], NDArray[np.float64]]
    """Function from Gram matrices, (rows, k, k), to the weights of the vectors, (rows, k)."""

ROWS_AT_ONCE = 64
"""Number of rows per matrix product."""


class Rule:
    """The formula that computes every element of a tensor once the statistics are known: a frozen value.

    Called on blocks it returns theta in fp64. That is the reference, and it runs wherever a backend has not registered
    a faster implementation for the class. A subclass is a frozen dataclass; if it merges task vectors, it has a field
    `vectors`.
    """

    rows_at_once = 1
    """If the extent is ROW: the number of rows computed in one operation; blocks are cut at its multiples."""

    @property
    def extent(self) -> Extent:
        """The elements that it must see at once."""
        return Extent.ROW if ranked(self) else Extent.ELEMENT

    @property
    def removes(self) -> bool:
        """Whether it may remove entries of task vectors."""
        return any(vector.removes for vector in vectors_of(self))

    def __call__(
        self,
        models: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        where: Where,
        fishers: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Return theta in fp64 for fp32 (or fp64) blocks of equal shape."""
        raise NotImplementedError

    def kept(
        self, models: Sequence[torch.Tensor], base: torch.Tensor | None, where: Where
    ) -> tuple[int, ...]:
        """Return how many entries of each task vector survive; empty if all do."""
        if base is None or not self.removes:
            return ()
        return tuple(int(v.mask(models[i], base, where).sum()) for i, v in enumerate(vectors_of(self)))

    def look_at_fishers(self, fishers: Sequence[torch.Tensor]) -> tuple[int, int]:
        """Return the number of invalid values of the diagonals, and of elements that a floor decides."""
        return 0, 0


@dataclass(frozen=True)
class WeightedSum(Rule):
    """theta = (w_0 theta_0 + sum_i w_i theta_i) / divisor."""

    weights: tuple[float, ...]
    divisor: float = 1.0
    base_weight: float = 0.0
    """w_0; 0 if the base is not part of the sum."""

    def __call__(
        self,
        models: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        where: Where,
        fishers: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Return the fp64 sum over fp32 (or fp64) `models` of equal shape."""
        total = _zeros(models[0])
        if self.base_weight:
            assert base is not None
            total = total + self.base_weight * base.double()
        for weight, theta in zip(self.weights, models, strict=True):
            total = total + weight * theta.double()
        return total / self.divisor if self.divisor != 1.0 else total


@dataclass(frozen=True)
class TaskVectorMerge(Rule):
    """theta = theta_0 + scale * tau, where tau sums all task vectors' entries, or those of the elected sign."""

    vectors: tuple[TaskVector, ...]
    elect: bool = False
    """Elect a sign per element, the one with the larger total magnitude, and merge only its
    entries (TIES, https://arxiv.org/abs/2306.01708, section 4)."""
    zero_sign: int = 0
    """The sign elected where the totals are equal: +1, -1, or 0 for none (the base stays)."""
    normalize: bool = False
    """With `elect`: divide by the sum of the weights of the merged entries."""
    divisor: float = 1.0
    """Without `elect`: the divisor of the sum."""
    scale: float = 1.0

    def __call__(
        self,
        models: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        where: Where,
        fishers: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Return theta in fp64 for fp32 (or fp64) blocks of equal shape."""
        assert base is not None
        if self.elect:
            tau = self._disjoint_merge(models, base, where)
        else:
            tau = _zeros(base)
            for vector, theta in zip(self.vectors, models, strict=True):
                tau = tau + vector.entries(theta, base, where)
            tau = tau / self.divisor if self.divisor != 1.0 else tau
        return base.double() + self.scale * tau

    def _totals(
        self, models: Sequence[torch.Tensor], base: torch.Tensor, where: Where
    ) -> tuple[torch.Tensor, ...]:
        """Total magnitude and total weight of the entries of each sign: (up, down, w_up, w_down)."""
        up = _zeros(base)
        down, up_weight, down_weight = up.clone(), up.clone(), up.clone()
        for vector, theta in zip(self.vectors, models, strict=True):
            tau = vector.entries(theta, base, where)
            up = up + tau.clamp(min=0.0)
            down = down + (-tau).clamp(min=0.0)
            up_weight = up_weight + vector.weight * (tau > 0).double()
            down_weight = down_weight + vector.weight * (tau < 0).double()
        return up, down, up_weight, down_weight

    def _disjoint_merge(
        self, models: Sequence[torch.Tensor], base: torch.Tensor, where: Where
    ) -> torch.Tensor:
        import torch

        up, down, up_weight, down_weight = self._totals(models, base, where)
        lead = up - down  # the elected sign is that of the lead; a NaN has sign 0, which must not hide it
        negative = (lead < 0) | ((lead == 0) & (self.zero_sign < 0))
        merged = torch.where(negative, -down, up)
        if self.zero_sign == 0:
            merged = torch.where(lead == 0, 0.0, merged)
        if self.normalize:
            weight = torch.where(negative, down_weight, up_weight)
            merged = merged / torch.where(weight == 0, 1.0, weight)
        return merged

    def sign_total(self, models: Sequence[torch.Tensor], base: torch.Tensor, where: Where) -> int:
        """Return the number of elements that elect + minus the number that elect - (TIES' whole-model majority)."""
        up, down, _, _ = self._totals(models, base, where)
        return int((up - down).sign().sum())


@dataclass(frozen=True)
class SelectedMerge(Rule):
    """theta = theta_0 + the weighted mean of those selected entries whose sign is that of their sum.

    The election is unweighted; weights enter the mean only (SCE, https://arxiv.org/abs/2408.07990).
    """

    vectors: tuple[TaskVector, ...]
    selection: Selection | None = None
    """The selected elements; None: all of them."""
    zero_sign: int = 0
    """The sign elected where the entries cancel: +1, or 0 for none (the base stays)."""
    floor: float = 0.0
    """The smallest divisor of the mean; smaller sums of agreeing weights are raised to it."""

    @property
    def extent(self) -> Extent:
        """ROW if the selection's score depends on whole rows, else ELEMENT."""
        by_rows = self.selection is not None and sees_rows(self.selection.score)
        return Extent.ROW if by_rows else super().extent

    @property
    def removes(self) -> bool:
        """Whether entries may be dropped or not selected."""
        return self.selection is not None or super().removes

    def kept(
        self, models: Sequence[torch.Tensor], base: torch.Tensor | None, where: Where
    ) -> tuple[int, ...]:
        """Return the number of selected elements for each task vector; without a selection, of surviving entries."""
        if self.selection is None or base is None:
            return super().kept(models, base, where)
        return (int(self.selection.mask(models, base, where).sum()),) * len(self.vectors)

    def __call__(
        self,
        models: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        where: Where,
        fishers: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Return theta in fp64 for flat fp32 (or fp64) blocks."""
        import torch

        assert base is not None
        selected = self.selection.mask(models, base, where) if self.selection is not None else None
        up = _zeros(base)
        down, up_sum, down_sum, up_weight, down_weight = (up.clone() for _ in range(5))
        for vector, theta in zip(self.vectors, models, strict=True):
            tau = vector.rescale * vector.surviving(theta, base, where).double()
            if selected is not None:
                tau = tau.masked_fill(~selected, 0.0)
            positive, negative = tau.clamp(min=0.0), (-tau).clamp(min=0.0)
            up, down = up + positive, down + negative
            up_sum, down_sum = up_sum + vector.weight * positive, down_sum + vector.weight * negative
            up_weight = up_weight + vector.weight * (tau > 0).double()
            down_weight = down_weight + vector.weight * (tau < 0).double()
        lead = (
            up - down
        )  # a NaN is not negative, so it joins the positive entries, where the check on the output finds it
        merged = torch.where(lead < 0, -down_sum, up_sum)
        if self.zero_sign == 0:
            merged = torch.where(lead == 0, 0.0, merged)
        weight = torch.where(lead < 0, down_weight, up_weight).clamp(min=self.floor)
        return base.double() + merged / torch.where(weight == 0, 1.0, weight)


@dataclass(frozen=True)
class TouchedMerge(Rule):
    """theta = theta_0 + the mean of the task vectors over the models that touched the element.

    A model touched an element if its entry exceeds `epsilon` in magnitude. An entry that a single model touched is
    multiplied by that model's factor (RAM and RAM+, https://arxiv.org/abs/2601.13572).
    """

    vectors: tuple[TaskVector, ...]
    epsilon: float
    factors: tuple[float, ...]

    def __call__(
        self,
        models: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        where: Where,
        fishers: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Return theta in fp64 for fp32 (or fp64) blocks of equal shape."""
        import torch

        assert base is not None
        total = _zeros(base)
        unique, count = total.clone(), total.clone()
        for factor, (tau, touched) in zip(
            self.factors, touched_entries(self.vectors, self.epsilon, models, base, where), strict=True
        ):
            entry = tau.masked_fill(~touched, 0.0)
            total = total + entry
            unique = unique + factor * entry
            count = count + touched
        return base.double() + torch.where(count == 1, unique, total / count.clamp(min=1.0))


def touched_entries(
    vectors: Sequence[TaskVector],
    epsilon: float,
    models: Sequence[torch.Tensor],
    base: torch.Tensor,
    where: Where,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each task vector in fp64 with the mask of its touched entries; non-finite entries count as touched."""
    for vector in vectors:
        tau = vector.rescale * vector.surviving(models[vector.model], base, where).double()
        yield tau, ~(tau.abs() <= epsilon)


@dataclass(frozen=True)
class FisherMean(Rule):
    """theta = sum_i a_i theta_i / sum_i a_i, per element, with a_i = coefficient_i * floored F_i.

    It is the mode of the product of the models' diagonal Laplace posteriors (Matena & Raffel 2022, equation 3). It is
    evaluated in fp64 relative to the target, the first model, and clamped to the range of the models' values, which
    the exact formula never leaves.
    """

    coefficients: tuple[float, ...]
    """lambda_i, divided by the norm of the model's diagonal if normalised; not negative."""
    floors: tuple[float, ...]
    """The floor of each diagonal, in units of the raw diagonal; 0: none."""
    add: bool = False
    """Whether the floor is added (F + floor); else F is raised to it (max(F, floor))."""
    average: tuple[float, ...] = ()
    """Weights of the plain average used where all diagonals are 0; empty: the target's value is used."""
    vectors: tuple[TaskVector, ...] = ()
    """The task vectors after a drop, if any: the models are theta_0 + their surviving, rescaled task vectors."""

    def __call__(
        self,
        models: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        where: Where,
        fishers: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Return theta in fp64 for fp32 (or fp64) blocks of equal shape."""
        import torch

        thetas = [
            self.vectors[i].dropped_model(theta, base, where)
            if self.vectors and base is not None
            else theta.double()
            for i, theta in enumerate(models)
        ]
        target = low = high = thetas[0]
        moved, _, total = self._sums(thetas, fishers)
        for theta in thetas[1:]:
            low, high = torch.where(theta < low, theta, low), torch.where(theta > high, theta, high)
        merged = target + moved / torch.where(total == 0, 1.0, total)
        merged = torch.where(merged < low, low, merged)
        merged = torch.where(merged > high, high, merged)
        fallback = target
        if self.average:
            mean = _zeros(target)
            for weight, theta in zip(self.average, thetas, strict=True):
                mean = mean + weight * theta
            fallback = mean / sum(self.average)
        return torch.where(total == 0, fallback, merged)

    def _sums(
        self, thetas: Sequence[torch.Tensor], fishers: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the sums of a_i (theta_i - theta_target), of the floors' part of a_i, and of a_i."""
        import torch

        moved = _zeros(fishers[0])
        raised, total = moved.clone(), moved.clone()
        for i, fisher in enumerate(fishers):
            known = fisher.double()
            floored = (
                known + self.floors[i]
                if self.add
                else torch.where(known < self.floors[i], self.floors[i], known)
            )
            a = self.coefficients[i] * floored
            moved = moved + a * (thetas[i] - thetas[0])
            raised = raised + self.coefficients[i] * (floored - known)
            total = total + a
        return moved, raised, total

    def look_at_fishers(self, fishers: Sequence[torch.Tensor]) -> tuple[int, int]:
        """Return the number of negative values, and of elements in which floors make up more than half of the weight."""
        return sum(int((fisher < 0).sum()) for fisher in fishers), self.decided_by_floor(fishers)

    def decided_by_floor(self, fishers: Sequence[torch.Tensor]) -> int:
        """Return the number of elements in which floors make up more than half of the weight."""
        zeros = [_zeros(fisher) for fisher in fishers]
        _, raised, total = self._sums(zeros, fishers)
        return int((raised > 0.5 * total).sum())


@dataclass(frozen=True)
class Formula(Rule):
    """A plain torch function of the blocks, such as a user's own method."""

    function: Callable[..., Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    vectors: tuple[TaskVector, ...] = ()
    """The task vectors after a drop, if any, as in `FisherMean`."""
    method: str = ""
    """The name of the method, for messages."""

    def __call__(
        self,
        models: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        where: Where,
        fishers: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Return the function's result: a floating-point tensor of the blocks' shape."""
        return self.function(list(models), base, **self.parameters)

    def dropped(
        self, models: Sequence[torch.Tensor], base: torch.Tensor | None, where: Where
    ) -> list[torch.Tensor]:
        """Return the models that the function is given, in the dtype of the blocks."""
        if not self.vectors or base is None:
            return list(models)
        pairs = zip(self.vectors, models, strict=True)
        return [vector.dropped_model(theta, base, where).to(theta.dtype) for vector, theta in pairs]


@dataclass(frozen=True)
class RowCombination(Rule):
    """Each row is a weighted sum of the models' rows, or of the base's and the task vectors', with its own weights.

    The weights are a function of the row's Gram matrix. A tensor with one axis is one row.
    """

    coefficients: Coefficients
    vectors: tuple[TaskVector, ...] = ()
    """The task vectors; empty: the models themselves, after the base if the method has one."""

    @property
    def extent(self) -> Extent:
        """Whole rows."""
        return Extent.ROW

    def combined(
        self, models: Sequence[torch.Tensor], base: torch.Tensor | None, where: Where, weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum in fp64 for blocks of shape (rows, length) and `weights` (rows, k) in fp64."""
        return _combined(self.vectors, [one.unsqueeze(1) for one in weights.unbind(1)], models, base, where)


@dataclass(frozen=True)
class ColumnCombination(Rule):
    """Each column (along the first axis) is a weighted sum of the models', or of the base's and the task vectors'."""

    weights: NDArray[np.float64] = field(compare=False)
    """Weights (k, columns) of the vectors, which are those of `RowCombination`."""
    vectors: tuple[TaskVector, ...] = ()

    @property
    def extent(self) -> Extent:
        """Whole columns."""
        return Extent.COLUMN

    def combined(
        self, models: Sequence[torch.Tensor], base: torch.Tensor | None, where: Where, weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum in fp64 for blocks of shape (rows, columns); `weights` are this rule's, as a tensor."""
        return _combined(self.vectors, [one.unsqueeze(0) for one in weights], models, base, where)


def _combined(
    vectors: Sequence[TaskVector],
    weights: Sequence[torch.Tensor],
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    where: Where,
) -> torch.Tensor:
    """Return the weighted sum of vectors, plus the base if they are task vectors; weights broadcast to the blocks."""
    assert base is not None or not vectors
    scaled = [w * v.rescale for w, v in zip(weights, vectors, strict=True)] if vectors else weights
    total = _zeros(models[0])
    for weight, term in zip(scaled, terms_of(vectors, models, base, where), strict=True):
        total = total + weight * term.double()
    return base.double() + total if vectors and base is not None else total


@dataclass(frozen=True)
class CopyOf(Rule):
    """One model's tensor, unchanged except for the output's dtype."""

    model: int = 0

    def __call__(
        self,
        models: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        where: Where,
        fishers: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Return the model's values as a weighted sum, so that a non-finite value in any model shows."""
        weights = tuple(float(i == self.model) for i in range(len(models)))
        return WeightedSum(weights)(models, base, where)


@dataclass(frozen=True, eq=False)
class RegressionMean(Rule):
    """theta = mean + sum_i (theta_i - mean) P_i, row by row; see `regmean`."""

    weights: tuple[float, ...]
    operators: tuple[torch.Tensor, ...]
    """P_i per model, fp64 (inputs, inputs)."""

    rows_at_once = ROWS_AT_ONCE

    @property
    def extent(self) -> Extent:
        """Whole rows."""
        return Extent.ROW

    def __call__(
        self,
        models: Sequence[torch.Tensor],
        base: torch.Tensor | None,
        where: Where,
        fishers: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Return theta in fp64, flat, for flat blocks of whole rows.

        Products take `ROWS_AT_ONCE` rows at a time, so that their shape does not depend on how blocks are cut.
        """
        import torch

        width = len(self.operators[0])
        rows = [model.double().reshape(-1, width) for model in models]
        total = sum(self.weights)
        mean = sum(w * theta for w, theta in zip(self.weights, rows, strict=True)) / total
        assert isinstance(mean, torch.Tensor)
        for first in range(0, len(mean), ROWS_AT_ONCE):
            some = slice(first, first + ROWS_AT_ONCE)
            start = mean[some].clone()
            for theta, operator in zip(rows, self.operators, strict=True):
                # A non-finite value shows at its own element only; the rest of its row uses the average in its place.
                away = (theta[some] - start).nan_to_num(0.0, 0.0, 0.0)
                mean[some] += away @ operator.to(theta.device)
        return mean.reshape(-1)


def vectors_of(rule: Rule) -> tuple[TaskVector, ...]:
    """Return the task vectors of a rule; empty if it has none."""
    vectors: tuple[TaskVector, ...] = getattr(rule, "vectors", ())
    return vectors


def ranked(rule: Rule) -> bool:
    """Return whether entries are dropped by their rank in a row, which needs whole rows."""
    return any(vector.rank_drop is not None for vector in vectors_of(rule))


def removing(rule: Rule) -> tuple[TaskVector, ...]:
    """Return the task vectors of a rule if any of them may lose entries; else an empty tuple."""
    return vectors_of(rule) if rule.removes else ()


def _zeros(like: torch.Tensor) -> torch.Tensor:
    """Return fp64 zeros of a block's shape; multiplying by 0 would turn infinity into NaN."""
    import torch

    return torch.zeros_like(like, dtype=torch.float64)
