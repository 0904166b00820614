"""Task vectors and the masks of entries that survive drops and cuts, as formulas in torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, replace
from typing import TYPE_CHECKING, Literal

from streammerge.numerics import philox as rng
from streammerge.records import dataclass

if TYPE_CHECKING:
    import torch

TiePolicy = Literal["drop", "all", "thin", "index"]


@dataclass(frozen=True)
class Where:
    """The position of a block: the tensor, and the elements of it."""

    tensor: str
    """Canonical output name; it keys the random words."""
    start: int
    """Flat row-major index of the block's first element within the whole tensor."""
    keys: rng.RandomKeys
    row_length: int = 1
    """Number of elements per row, if the block consists of whole rows."""
    masks: dict[TaskVector, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, compare=False)
    """Masks computed so far; the formula and the count of survivors need the same ones."""
    divergences: dict[object, torch.Tensor] = field(default_factory=dict, compare=False)
    """Values per row computed so far by a score that depends on whole rows."""

    def words(self, purpose: str, model: int | None, n: int, device: torch.device) -> torch.Tensor:
        """Return one random word per element of the block, int64 in [0, 2**32)."""
        return rng.words(self.keys.key(purpose, model, self.tensor), self.start, self.start + n, device)

    def words_at(self, purpose: str, model: int | None, places: torch.Tensor) -> torch.Tensor:
        """Return the random words of some elements, given by their indices within the block."""
        return rng.words_at(self.keys.key(purpose, model, self.tensor), places + self.start)


@dataclass(frozen=True)
class Cut:
    """Keep elements by magnitude: those above a threshold, and some of those equal to it."""

    key: int
    """Bit pattern of the fp32 threshold (sign bit cleared); patterns order as magnitudes do."""
    ties: TiePolicy
    limit: int = 0
    """With `thin`: ties whose word is below it are kept. With `index`: ties before this element are kept."""


@dataclass(frozen=True)
class RankDrop:
    """Keep an entry with probability low + spread * (r - 1) / (n - 1), where r is its magnitude's rank in a row of n.

    This is DELLA's MagPrune (https://arxiv.org/abs/2406.11617). The smallest magnitude has rank 1; equal magnitudes
    share the mean of their ranks. In a row of one element the probability is low + spread / 2.
    """

    low: float
    spread: float
    unbiased: bool = True
    """Whether survivors are divided by their probability."""

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
    """delta_i = theta_i - theta_0 of one model as it enters the sum: after drop, cut, rescaling and weighting.

    A random drop comes first and a magnitude cut after it; either may be absent.
    """

    model: int
    weight: float = 1.0
    rescale: float = 1.0
    """Factor that compensates for the removed entries."""
    drop: int = 0
    """Elements whose "dare" word is below this are dropped; see `numerics.philox.threshold`."""
    drop_end: int = 0
    """Elements before this one whose word equals `drop` are dropped too."""
    shared: bool = False
    """Whether the random words are those shared by all models, not the model's own."""
    cut: Cut | None = None
    outliers: Cut | None = None
    """A second cut whose kept (largest) entries are removed. It requires `cut`, and shares its tie policy."""
    rank_drop: RankDrop | None = None
    """A drop by the rank of the magnitude; it excludes `drop` and `cut`."""

    sees_rows = False
    """Its entries before a drop by rank or a cut are ranked one by one."""

    @property
    def only_model(self) -> int:
        """The only model that its magnitudes depend on."""
        return self.model

    @property
    def coefficient(self) -> float:
        """The factor of a surviving entry: weight times rescale."""
        return self.weight * self.rescale

    @property
    def unweighted(self) -> TaskVector:
        """The same entries, whatever their factor: as they are ranked by magnitude."""
        return replace(self, weight=1.0, rescale=1.0)

    @property
    def is_random(self) -> bool:
        """Whether entries are dropped at random. Random choices among ties at a threshold do not count."""
        return 0 < self.drop < 2**32 or self.drop_end > 0 or self.rank_drop is not None

    @property
    def removes(self) -> bool:
        """Whether any entry may be removed."""
        return self.drop > 0 or self.drop_end > 0 or self.cut is not None or self.rank_drop is not None

    @property
    def stream(self) -> int | None:
        """The model whose random words are used; None: the stream that all models share."""
        return None if self.shared else self.model

    def dropped_model(self, theta: torch.Tensor, base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return theta_0 + rescale * surviving delta in fp64: the model after the drop."""
        return base.double() + self.rescale * self.surviving(theta, base, where).double()

    def entries(self, theta: torch.Tensor, base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return the task vector as it enters the sum: coefficient times surviving entries, in fp64."""
        import torch

        left = self.surviving(theta, base, where).double()
        if self.rank_drop is not None and self.rank_drop.unbiased:
            q = self.rank_drop.probabilities(theta - base, where.row_length)
            left = torch.where(left == 0, left, left / q)
        return self.coefficient * left

    def surviving(self, theta: torch.Tensor, base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return the entries of the task vector that survive, 0 elsewhere, in the inputs' dtype."""
        return (theta - base).masked_fill(~self.mask(theta, base, where), 0.0)

    def patterns(self, models: Sequence[torch.Tensor], base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return the fp32 patterns of the magnitudes of surviving entries, int32: they order as magnitudes do."""
        import torch

        delta = self.surviving(models[self.model], base, where).float()
        return delta.view(torch.int32) & 0x7FFFFFFF

    def mask(self, theta: torch.Tensor, base: torch.Tensor, where: Where) -> torch.Tensor:
        """Return the mask of surviving entries; a dropped entry counts as 0 for the cut."""
        return self._masks(theta, base, where)[0]

    def kept(self, theta: torch.Tensor, base: torch.Tensor, where: Where) -> int:
        """Return the number of entries that survive; with a cut, that of the entries it keeps, dropped ones as 0 included."""
        return int(self._masks(theta, base, where)[1].sum())

    def _masks(
        self, theta: torch.Tensor, base: torch.Tensor, where: Where
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self not in where.masks:
            where.masks[self] = self._survive(theta, base, where)
        return where.masks[self]

    def _survive(
        self, theta: torch.Tensor, base: torch.Tensor, where: Where
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mask of the entries that survive, and that of the entries that count as kept."""
        import torch

        delta = theta - base
        if self.rank_drop is not None:
            words = where.words("della", self.stream, delta.numel(), delta.device)
            q = self.rank_drop.probabilities(delta, where.row_length)
            keep = (words < (q * 2.0**32 + 0.5).floor().long()) | ~torch.isfinite(delta)
            return keep, keep
        keep = torch.ones_like(delta, dtype=torch.bool)
        if self.drop or self.drop_end:
            words = where.words("dare", self.stream, delta.numel(), delta.device)
            keep = words >= self.drop
            if self.drop_end:
                place = torch.arange(where.start, where.start + delta.numel(), device=delta.device)
                keep &= (words > self.drop) | (place >= self.drop_end)
            # Never drop a non-finite value: the check on the output must see it.
            keep |= ~torch.isfinite(delta)
            delta = delta.masked_fill(~keep, 0.0)
        if self.cut is None:
            return keep, keep
        key = delta.float().view(torch.int32) & 0x7FFFFFFF
        kept = self._kept_by(self.cut, key, where)
        if self.outliers is not None:
            # Never remove a non-finite value as an outlier: the check on the output must see it.
            kept &= ~self._kept_by(self.outliers, key, where) | (key >= 0x7F800000)
        # At a threshold of 0 a cut may keep what was dropped: that does not come back.
        return keep & kept, kept

    def _kept_by(self, cut: Cut, key: torch.Tensor, where: Where) -> torch.Tensor:
        above = key > cut.key
        if cut.ties == "drop":
            return above
        if cut.ties == "all":
            return key >= cut.key
        tied = (key == cut.key).nonzero().squeeze(-1)
        if cut.ties == "index":
            kept = tied[tied + where.start < cut.limit]
        elif 4 * tied.numel() < key.numel():  # one scattered word costs as much as four consecutive ones
            kept = tied[where.words_at("ties", self.stream, tied) < cut.limit]
        else:
            kept = tied[where.words("ties", self.stream, key.numel(), key.device)[tied] < cut.limit]
        return above.index_fill(0, kept, True)


def terms_of(
    vectors: Sequence[TaskVector], models: Sequence[torch.Tensor], base: torch.Tensor | None, where: Where
) -> list[torch.Tensor]:
    """Return the surviving entries of the task vectors; without task vectors, the base (if any) and the models."""
    if not vectors:
        return [*([] if base is None else [base]), *models]
    assert base is not None
    shape = base.shape
    return [v.surviving(models[v.model].flatten(), base.flatten(), where).reshape(shape) for v in vectors]
