"""What happens to every element once the statistics are known: the formulas, in torch.

A recipe is a frozen value. Called on fp32 pieces it is the reference and the GPU path; the engine
has a fused CPU kernel for each kind, bit-equal by test. Sums over models run in fp64, in configured
order, multiply and add apart; the engine rounds the fp64 result once, to the output's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from streammerge.methods import rng

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Coefficients = Callable[[NDArray[np.float64]], NDArray[np.float64]]
    """From Gram matrices, (rows, k, k), to the weights of the vectors, (rows, k)."""

TiePolicy = Literal["drop", "all", "thin", "index"]


@dataclass(frozen=True)
class Where:
    """Which elements of which tensor a piece holds."""

    tensor: str
    """Canonical output name; it keys the random words."""
    start: int
    """Flat row-major index of the piece's first element in the whole tensor."""
    keys: rng.RandomKeys
    row_length: int = 1
    """Elements of a row, where the piece is of whole rows."""
    masks: dict[TaskVector, torch.Tensor] = field(default_factory=dict, compare=False)
    """The masks of these elements found so far: a formula, and who counts what it kept, ask for the same."""

    def words(self, purpose: str, model: int | None, n: int, device: torch.device) -> torch.Tensor:
        """Return one random word per element of the piece, int64 in [0, 2**32)."""
        return rng.words(self.keys.key(purpose, model, self.tensor), self.start, self.start + n, device)

    def words_at(self, purpose: str, model: int | None, places: torch.Tensor) -> torch.Tensor:
        """Return the random words of some elements of the piece, given by their places in it."""
        return rng.words_at(self.keys.key(purpose, model, self.tensor), places + self.start)


@dataclass(frozen=True)
class Cut:
    """Keep elements by magnitude: those above a threshold, and some of those at it."""

    key: int
    """Bit pattern of the fp32 threshold, sign bit off: patterns order as magnitudes do."""
    ties: TiePolicy
    limit: int = 0
    """`thin`: the word below which a tie is kept. `index`: the element before which it is."""


@dataclass(frozen=True)
class RankDrop:
    """Keep an entry with probability low + spread * (r - 1) / (n - 1), r the rank of its magnitude in its row of n.

    DELLA's MagPrune (https://arxiv.org/abs/2406.11617). The smallest has rank 1, equal ones the mean of their ranks;
    in a row of one the probability is that of the middle.
    """

    low: float
    spread: float
    unbiased: bool = True
    """A survivor is divided by its probability."""

    def probabilities(self, delta: torch.Tensor, row_length: int) -> torch.Tensor:
        """Return the probability of each entry, fp64 and flat, for whole rows."""
        import torch

        rows = delta.float().view(torch.int32).bitwise_and(0x7FFFFFFF).reshape(-1, row_length)
        if not self.spread or row_length == 1:
            return torch.full(
                (rows.numel(),), self.low + self.spread * 0.5, dtype=torch.float64, device=delta.device
            )
        ordered = rows.sort(dim=1).values
        first = torch.searchsorted(ordered, rows)
        last = torch.searchsorted(ordered, rows, right=True)
        place = 0.5 * (first + last - 1).double()
        return (self.low + self.spread * (place / (row_length - 1))).flatten()


@dataclass(frozen=True)
class TaskVector:
    """delta_i = theta_i - theta_0 of one model, as it enters the sum: dropped, cut, rescaled, weighed.

    A random drop comes first and a magnitude cut after it; either may be absent.
    """

    model: int
    weight: float = 1.0
    rescale: float = 1.0
    """Factor that makes up for the removed entries."""
    drop: int = 0
    """Elements whose "dare" word lies below this are dropped; see `rng.threshold`."""
    drop_end: int = 0
    """Before this element, those whose word equals `drop` are dropped too."""
    shared: bool = False
    """The random words are those of all models together, not the model's own."""
    cut: Cut | None = None
    outliers: Cut | None = None
    """What this cut keeps, the largest, is removed after all: only with `cut`, whose tie policy it shares."""
    rank_drop: RankDrop | None = None
    """Drops entries by the rank of their magnitude; none of the others with it."""

    @property
    def coefficient(self) -> float:
        """The one factor that multiplies a surviving entry."""
        return self.weight * self.rescale

    @property
    def is_random(self) -> bool:
        """Whether any random word decides over its entries."""
        dropped_by_word = 0 < self.drop < 2**32 or self.drop_end > 0 or self.rank_drop is not None
        return dropped_by_word or (self.cut is not None and self.cut.ties == "thin")

    @property
    def removes(self) -> bool:
        """Whether any entry may be removed."""
        return self.drop > 0 or self.drop_end > 0 or self.cut is not None or self.rank_drop is not None

    @property
    def stream(self) -> int | None:
        """The model whose random words decide; None: the stream that all models share."""
        return None if self.shared else self.model

    def dropped_model(self, theta: torch.Tensor, base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return theta_0 + rescale * surviving delta in fp64: the model as it is after the drop."""
        return base.double() + self.rescale * self.surviving(theta, base, where).double()

    def entries(self, theta: torch.Tensor, base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return the task vector as it enters the sum: its coefficient times what survives, in fp64."""
        import torch

        left = self.surviving(theta, base, where).double()
        if self.rank_drop is not None and self.rank_drop.unbiased:
            q = self.rank_drop.probabilities(theta - base, where.row_length)
            left = torch.where(left == 0, left, left / q)
        return self.coefficient * left

    def surviving(self, theta: torch.Tensor, base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return the entries of the task vector that survive, 0 elsewhere, in the inputs' dtype."""
        return (theta - base).masked_fill(~self.mask(theta, base, where), 0.0)

    def mask(self, theta: torch.Tensor, base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return which entries survive; a dropped entry counts as 0 for the cut."""
        if self not in where.masks:
            where.masks[self] = self._mask(theta, base, where)
        return where.masks[self]

    def _mask(self, theta: torch.Tensor, base: torch.Tensor, where: Where) -> torch.Tensor:
        import torch

        delta = theta - base
        if self.rank_drop is not None:
            words = where.words("della", self.stream, delta.numel(), delta.device)
            q = self.rank_drop.probabilities(delta, where.row_length)
            return (words < (q * 2.0**32 + 0.5).floor().long()) | ~torch.isfinite(delta)
        keep = torch.ones_like(delta, dtype=torch.bool)
        if self.drop or self.drop_end:
            words = where.words("dare", self.stream, delta.numel(), delta.device)
            keep = words >= self.drop
            if self.drop_end:
                place = torch.arange(where.start, where.start + delta.numel(), device=delta.device)
                keep &= (words > self.drop) | (place >= self.drop_end)
            # What is not finite is never dropped: it must show in the output, where it is found.
            keep |= ~torch.isfinite(delta)
            delta = delta.masked_fill(~keep, 0.0)
        if self.cut is None:
            return keep
        key = delta.float().view(torch.int32) & 0x7FFFFFFF
        kept = self._kept_by(self.cut, key, where)
        if self.outliers is None:
            return kept
        # What is not finite is no outlier: it must show in the output, where it is found.
        return kept & (~self._kept_by(self.outliers, key, where) | (key >= 0x7F800000))

    def _kept_by(self, cut: Cut, key: torch.Tensor, where: Where) -> torch.Tensor:
        above = key > cut.key
        if cut.ties == "drop":
            return above
        if cut.ties == "all":
            return key >= cut.key
        tied = (key == cut.key).nonzero().squeeze(-1)
        if cut.ties == "index":
            kept = tied[tied + where.start < cut.limit]
        elif 4 * tied.numel() < key.numel():  # a word for one costs as much as for four in a row
            kept = tied[where.words_at("ties", self.stream, tied) < cut.limit]
        else:
            kept = tied[where.words("ties", self.stream, key.numel(), key.device)[tied] < cut.limit]
        return above.index_fill(0, kept, True)


@dataclass(frozen=True)
class WeightedSum:
    """theta = (w_0 theta_0 + sum_i w_i theta_i) / divisor."""

    weights: tuple[float, ...]
    divisor: float = 1.0
    base_weight: float = 0.0
    """w_0; 0 where the base has no part in the sum."""

    def __call__(
        self, models: Sequence[torch.Tensor], base: torch.Tensor | None, where: Where,
        fishers: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:  # fmt: skip
        """Return the fp64 sum over fp32 (or fp64) `models` of equal shape."""
        total = _zeros(models[0])
        if self.base_weight:
            assert base is not None
            total = total + self.base_weight * base.double()
        for weight, theta in zip(self.weights, models, strict=True):
            total = total + weight * theta.double()
        return total / self.divisor if self.divisor != 1.0 else total


@dataclass(frozen=True)
class TaskVectorMerge:
    """theta = theta_0 + scale * tau, where tau sums the task vectors, all or those of one sign."""

    vectors: tuple[TaskVector, ...]
    elect: bool = False
    """Elect a sign per element, the one with the larger total magnitude, and merge only its
    entries (TIES, https://arxiv.org/abs/2306.01708, section 4)."""
    zero_sign: int = 0
    """The sign elected where the totals are equal: 0 nobody's (the base stays), +1 or -1."""
    normalize: bool = False
    """With `elect`: divide by the weights of the entries merged."""
    divisor: float = 1.0
    """Without `elect`: what the sum is divided by."""
    scale: float = 1.0

    def __call__(
        self, models: Sequence[torch.Tensor], base: torch.Tensor | None, where: Where,
        fishers: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:  # fmt: skip
        """Return theta in fp64 for fp32 (or fp64) pieces of equal shape."""
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
        lead = up - down  # elect: the sign of the lead; of a NaN it would be 0, which must not hide it
        negative = (lead < 0) | ((lead == 0) & (self.zero_sign < 0))
        merged = torch.where(negative, -down, up)
        if self.zero_sign == 0:
            merged = torch.where(lead == 0, 0.0, merged)
        if self.normalize:
            weight = torch.where(negative, down_weight, up_weight)
            merged = merged / torch.where(weight == 0, 1.0, weight)
        return merged

    def sign_total(self, models: Sequence[torch.Tensor], base: torch.Tensor, where: Where) -> int:
        """Return how many elements elect + minus how many elect - (TIES' whole-model majority)."""
        up, down, _, _ = self._totals(models, base, where)
        return int((up - down).sign().sum())


@dataclass(frozen=True)
class FisherMean:
    """theta = sum_i a_i theta_i / sum_i a_i, per element, with a_i = coefficient_i * floored F_i.

    The mode of the product of the models' diagonal Laplace posteriors (Matena & Raffel 2022, equation 3).
    Evaluated in fp64 around the target, the first model, and held between the smallest and the largest of
    the models' values, where the formula puts it: rounding cannot move it out.
    """

    coefficients: tuple[float, ...]
    """lambda_i, over the norm of the model's diagonal where that is asked for; none negative."""
    floors: tuple[float, ...]
    """Raised to (or by) this, in units of the raw diagonal; 0 leaves it as it is."""
    add: bool = False
    """F + floor; else max(F, floor)."""
    average: tuple[float, ...] = ()
    """Where no model knows anything: weights of a plain average; empty: the target's value."""
    vectors: tuple[TaskVector, ...] = ()
    """A drop that comes before: the models are theta_0 + their surviving, rescaled task vectors."""

    def __call__(
        self, models: Sequence[torch.Tensor], base: torch.Tensor | None, where: Where,
        fishers: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:  # fmt: skip
        """Return theta in fp64 for fp32 (or fp64) pieces of equal shape."""
        import torch

        thetas = [
            self.vectors[i].dropped_model(theta, base, where)
            if self.vectors and base is not None else theta.double()
            for i, theta in enumerate(models)
        ]  # fmt: skip
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
        """Return the sums of a_i (theta_i - theta_target), of the floors' share of a_i, and of a_i."""
        import torch

        moved = _zeros(fishers[0])
        raised, total = moved.clone(), moved.clone()
        for i, fisher in enumerate(fishers):
            known = fisher.double()
            floored = known + self.floors[i] if self.add else torch.where(
                known < self.floors[i], self.floors[i], known
            )  # fmt: skip
            a = self.coefficients[i] * floored
            moved = moved + a * (thetas[i] - thetas[0])
            raised = raised + self.coefficients[i] * (floored - known)
            total = total + a
        return moved, raised, total

    def decided_by_floor(self, fishers: Sequence[torch.Tensor]) -> int:
        """Return the elements in which floors make up more than half of the weight."""
        zeros = [_zeros(fisher) for fisher in fishers]
        _, raised, total = self._sums(zeros, fishers)
        return int((raised > 0.5 * total).sum())


@dataclass(frozen=True)
class Formula:
    """A method that is a plain torch function of the pieces, such as a user's own."""

    function: Callable[..., Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    vectors: tuple[TaskVector, ...] = ()
    """A drop that comes before, as for `FisherMean`."""

    def __call__(
        self, models: Sequence[torch.Tensor], base: torch.Tensor | None, where: Where,
        fishers: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:  # fmt: skip
        """Return what the function returns: a floating tensor of the pieces' shape."""
        return self.function(list(models), base, **self.parameters)

    def dropped(
        self, models: Sequence[torch.Tensor], base: torch.Tensor | None, where: Where
    ) -> list[torch.Tensor]:
        """Return the models the function is to see, in the dtype of the pieces."""
        if not self.vectors or base is None:
            return list(models)
        pairs = zip(self.vectors, models, strict=True)
        return [vector.dropped_model(theta, base, where).to(theta.dtype) for vector, theta in pairs]


@dataclass(frozen=True)
class RowCombination:
    """Each row a sum of the models' rows, or of their task vectors' beside the base, by weights of its own.

    The weights are a function of the row's Gram matrix. A tensor without rows is one row.
    """

    coefficients: Coefficients
    vectors: tuple[TaskVector, ...] = ()
    """The task vectors; empty: the models themselves, and before them the base where the method has one."""

    def combined(
        self, models: Sequence[torch.Tensor], base: torch.Tensor | None, where: Where, weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum in fp64 for pieces of shape (rows, length) and `weights` (rows, k) in fp64."""
        assert base is not None or not self.vectors
        if self.vectors and base is not None:
            scaled = [weights[:, i] * vector.rescale for i, vector in enumerate(self.vectors)]
        else:
            scaled = list(weights.unbind(1))
        total = _zeros(models[0])
        for weight, rows in zip(scaled, self.terms(models, base, where), strict=True):
            total = total + weight.unsqueeze(1) * rows.double()
        return base.double() + total if self.vectors and base is not None else total

    def terms(
        self, models: Sequence[torch.Tensor], base: torch.Tensor | None, where: Where
    ) -> list[torch.Tensor]:
        """Return what is summed, in the pieces' shape: models, or surviving task vectors before their rescale."""
        return terms_of(self.vectors, models, base, where)


def terms_of(
    vectors: Sequence[TaskVector], models: Sequence[torch.Tensor], base: torch.Tensor | None, where: Where
) -> list[torch.Tensor]:
    """Return the surviving entries of task vectors; without any, the base, if there is one, and the models."""
    if not vectors:
        return [*([] if base is None else [base]), *models]
    assert base is not None
    shape = base.shape
    return [v.surviving(models[v.model].flatten(), base.flatten(), where).reshape(shape) for v in vectors]


@dataclass(frozen=True)
class CopyOf:
    """The bytes of one model's tensor, unchanged but for the output's dtype."""

    model: int = 0


Recipe = WeightedSum | TaskVectorMerge | FisherMean | RowCombination | Formula | CopyOf


def ranked(recipe: Recipe) -> bool:
    """Return whether entries are dropped by their rank in a row, which must then be whole."""
    return any(vector.rank_drop is not None for vector in getattr(recipe, "vectors", ()))


def removing(recipe: Recipe) -> tuple[TaskVector, ...]:
    """Return the task vectors of a recipe that may lose entries; empty if none does."""
    vectors = getattr(recipe, "vectors", ())
    return vectors if any(vector.removes for vector in vectors) else ()


def _zeros(like: torch.Tensor) -> torch.Tensor:
    """Return fp64 zeros of a piece's shape; 0 times an infinity would be NaN."""
    import torch

    return torch.zeros_like(like, dtype=torch.float64)
