"""A loaded piece through the torch formulas: the reference, users' own methods, fp64, and the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.gpu import free_unused, synchronize
from streammerge.engine.memory import Bytes
from streammerge.engine.pieces import Applied, Bins, Counts, Loaded, Operand, operand_bytes
from streammerge.engine.statistics import block_sums
from streammerge.errors import InputError, WorldError, printable
from streammerge.methods.recipes import (
    CopyOf,
    FisherMean,
    Formula,
    Recipe,
    RowCombination,
    TaskVector,
    TaskVectorMerge,
    WeightedSum,
    Where,
    ranked,
    removing,
    terms_of,
)
from streammerge.methods.requests import full_matrices

if TYPE_CHECKING:
    import torch

_HITS_AT_ONCE = 1 << 22
_Result = TypeVar("_Result")
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.int16}


class TorchMath:
    """A piece on a torch device; statistics are integers or fixed-order sums, equal to the kernels'.

    Parameters
    ----------
    device
        ``cpu`` or ``cuda[:N]``.
    block
        Elements worked on at a time where the formula may be cut anywhere.
    keep
        Whether the piece's operands fit the device's memory whole: they are then copied there once, however often
        they are passed over.
    """

    def __init__(self, piece: Loaded, device: str, block: int, *, keep: bool = False) -> None:
        self._piece = piece
        self._device = device
        self._block = block
        self._keep = keep
        self._kept: dict[Operand, torch.Tensor] = {}

    def _each(self, run: Callable[[int, int], _Result], divisor: int = 1) -> Iterator[_Result]:
        """Yield what `run` returns for each block; after an out-of-memory error the same block, cut smaller.

        `run` takes nothing into account before it has succeeded.

        Raises
        ------
        WorldError
            If the device has no room for the smallest block.
        """
        import torch

        start, size = 0, max(divisor, self._block // divisor * divisor)
        while start < self._piece.n:
            stop = min(self._piece.n, start + size)
            try:
                result = run(start, stop)
            except torch.OutOfMemoryError:
                if not self._keep:
                    size = min(size, stop - start) // 2 // divisor * divisor
                self._keep = False
                self._kept.clear()
                if size < divisor or not self._block:
                    raise WorldError(
                        f"tensor {printable(self._piece.tensor)}: {self._device} has no memory left for it; free "
                        "some, or merge with --device cpu"
                    ) from None
                free_unused(self._device)
                continue
            yield result
            start = stop

    def _tensor(self, operand: Operand, a: int, b: int) -> torch.Tensor:
        if self._keep:
            if operand not in self._kept:
                whole = self._host(operand, 0, self._piece.n)
                self._kept[operand] = whole.to(self._device, non_blocking=True)
            values = self._kept[operand][a:b]
        else:
            values = self._host(operand, a, b).to(self._device, non_blocking=True)
        return values.clone() if operand.dtype == "F64" else values.float()

    def _host(self, operand: Operand, a: int, b: int) -> torch.Tensor:
        """Return a view of an operand's bytes in the buffer."""
        import torch

        width = operand_bytes(operand, 1)
        raw: Bytes = self._piece.arena[operand.offset + a * width : operand.offset + b * width]
        values = torch.from_numpy(raw.view(_NUMPY[operand.dtype]))
        return values.view(torch.bfloat16) if operand.dtype == "BF16" else values

    def _inputs(self, a: int, b: int) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        import torch

        base = self._tensor(self._piece.base, a, b) if self._piece.base is not None else None
        models = [self._tensor(operand, a, b) for operand in self._piece.models]
        if any(tensor.dtype == torch.float64 for tensor in [*models, *([] if base is None else [base])]):
            models = [model.double() for model in models]
            base = None if base is None else base.double()
        return models, base

    def _fishers(self, a: int, b: int) -> list[torch.Tensor]:
        return [self._tensor(operand, a, b) for operand in self._piece.fishers]

    def _where(self, a: int) -> Where:
        piece = self._piece
        return Where(piece.tensor, piece.start + a, piece.keys, piece.row_length)

    def _surviving(self, vector: TaskVector, a: int, b: int) -> torch.Tensor:
        models, base = self._inputs(a, b)
        assert base is not None
        return vector.surviving(models[vector.model], base, self._where(a))

    def _patterns(self, vector: TaskVector, a: int, b: int) -> torch.Tensor:
        import torch

        delta = self._surviving(vector, a, b).float()
        return delta.view(torch.int32) & 0x7FFFFFFF

    def count_keys(self, vector: TaskVector, low: int, high: int, shift: int, bins: Bins) -> tuple[int, int]:
        """See `PieceMath`."""
        import torch

        def count(a: int, b: int) -> tuple[int, int, torch.Tensor]:
            keys = self._patterns(vector, a, b)
            inside = keys[(keys >= low) & (keys <= high)]
            return int((keys > high).sum()), int(keys.max()), (inside - low) >> shift

        above = highest = waiting = 0
        hits: list[torch.Tensor] = []

        def add_up() -> None:  # few hits a block, many bins: a block by itself would cost all bins
            if hits:
                counted = torch.bincount(torch.cat(hits), minlength=len(bins))
                bins[:] += counted.cpu().numpy().astype(np.int32)
                hits.clear()

        for more, top, hit in self._each(count):
            above += more
            highest = max(highest, top)
            hits.append(hit)
            waiting += hit.numel()
            if waiting >= _HITS_AT_ONCE:
                add_up()
                waiting = 0
        add_up()
        return above, highest

    def abs_sums(self, vector: TaskVector) -> NDArray[np.float64]:
        """See `PieceMath`."""

        def sums(a: int, b: int) -> NDArray[np.float64]:
            return block_sums(_finite(self._surviving(vector, a, b)).double().abs().cpu().numpy())

        step = 4096 if vector.rank_drop is None else math.lcm(4096, self._piece.row_length)
        partials = list(self._each(sums, step))
        return np.concatenate(partials) if partials else np.zeros(0)

    def fisher_squares(self, model: int) -> tuple[NDArray[np.float64], int]:
        """See `PieceMath`."""

        def sums(a: int, b: int) -> tuple[NDArray[np.float64], int]:
            values = self._fishers(a, b)[model].double().cpu().numpy()
            return block_sums(values * values), int((~(values >= 0) | np.isinf(values)).sum())

        found = list(self._each(sums, 4096))
        partials = [partial for partial, _ in found]
        return np.concatenate(partials) if partials else np.zeros(0), sum(bad for _, bad in found)

    def ties(self, vector: TaskVector, key: int, size: int) -> Counts:
        """See `PieceMath`."""

        def find(a: int, b: int) -> NDArray[np.int64]:
            places: NDArray[np.int64] = (
                (self._patterns(vector, a, b) == key).nonzero().flatten().cpu().numpy()
            )
            return places + a

        counts = np.zeros(-(-self._piece.n // size), np.int64)
        for places in self._each(find):
            counts += np.bincount(places // size, minlength=len(counts))
        return counts

    def dots(self, vectors: Sequence[TaskVector], length: int) -> NDArray[np.float64]:
        """See `PieceMath`."""

        def sums(a: int, b: int) -> NDArray[np.float64]:
            models, base = self._inputs(a, b)
            return self._dots(vectors, models, base, self._where(a), length)

        return np.concatenate(list(self._each(sums, length)))

    @staticmethod
    def _dots(
        vectors: Sequence[TaskVector], models: list[torch.Tensor], base: torch.Tensor | None, where: Where,
        length: int,
    ) -> NDArray[np.float64]:  # fmt: skip
        terms = [_finite(term).double() for term in terms_of(vectors, models, base, where)]
        for i, vector in enumerate(vectors):
            terms[i] = vector.rescale * terms[i]
        pairs = [terms[i] * terms[j] for i in range(len(terms)) for j in range(i, len(terms))]
        return np.stack([block_sums(pair.flatten().cpu().numpy(), length) for pair in pairs], axis=1)

    def _combine_rows(
        self, recipe: RowCombination, models: list[torch.Tensor], base: torch.Tensor | None, where: Where
    ) -> torch.Tensor:
        import torch

        length = self._piece.row_length
        k = len(recipe.vectors) or len(models) + (base is not None)
        pairs = self._dots(recipe.vectors, models, base, where, length)
        weights = np.ascontiguousarray(recipe.coefficients(full_matrices(pairs, k)))
        rows = [model.reshape(-1, length) for model in models]
        shaped = None if base is None else base.reshape(-1, length)
        merged = recipe.combined(rows, shaped, where, torch.from_numpy(weights).to(self._device))
        return merged.reshape(-1)

    def sign_total(self, merge: TaskVectorMerge) -> int:
        """See `PieceMath`."""

        def total(a: int, b: int) -> int:
            models, base = self._inputs(a, b)
            assert base is not None
            return merge.sign_total(models, base, self._where(a))

        return sum(self._each(total, self._piece.row_length if ranked(merge) else 1))

    def apply(self, recipe: Recipe, out: Operand) -> Applied:
        """See `PieceMath`."""
        if isinstance(recipe, CopyOf):
            recipe = WeightedSum(tuple(float(i == recipe.model) for i in range(len(self._piece.models))))
        vectors = removing(recipe)

        def merge(a: int, b: int) -> Applied:
            models, base = self._inputs(a, b)
            where = self._where(a)
            fishers = self._fishers(a, b)
            bad = floored = 0
            assert base is not None or not vectors
            kept = [
                int(v.mask(models[i], base, where).sum()) for i, v in enumerate(vectors) if base is not None
            ]
            if isinstance(recipe, FisherMean):
                floored = recipe.decided_by_floor(fishers)
                bad = sum(int((fisher < 0).sum()) for fisher in fishers)
            merged = self._call(recipe, models, base, where, fishers)
            return Applied(bad + self._store(merged, out, a, b), tuple(kept), floored)

        row = (
            self._piece.row_length if len(self._piece.shape) > 1 or isinstance(recipe, RowCombination) else 1
        )
        parts = list(self._each(merge, row if self._block else max(1, self._piece.n)))
        kept = tuple(sum(part.kept[i] for part in parts) for i in range(len(vectors)))
        return Applied(sum(part.not_finite for part in parts), kept, sum(part.floored for part in parts))

    def _call(
        self, recipe: Recipe, models: list[torch.Tensor], base: torch.Tensor | None, where: Where,
        fishers: list[torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        import torch

        assert not isinstance(recipe, CopyOf)
        if isinstance(recipe, RowCombination):
            return self._combine_rows(recipe, models, base, where)
        if not isinstance(recipe, Formula):
            return recipe(models, base, where, fishers)
        models = recipe.dropped(models, base, where)
        shape = self._piece.shape if len(self._piece.shape) != 1 else (-1,)
        if self._block and len(shape) > 1:
            shape = (-1, shape[-1])
        shaped = [model.reshape(shape) for model in models]
        merged = recipe(shaped, None if base is None else base.reshape(shape), where)
        if not isinstance(merged, torch.Tensor) or merged.shape != shaped[0].shape:
            what = tuple(merged.shape) if isinstance(merged, torch.Tensor) else type(merged).__name__
            raise InputError(
                f"tensor {printable(self._piece.tensor)}: the method returned {what}, not a tensor of shape "
                f"{tuple(shaped[0].shape)}"
            )
        return merged.reshape(-1)

    def _store(self, merged: torch.Tensor, out: Operand, a: int, b: int) -> int:
        import torch

        rounded = round_to(merged, out.dtype)
        bad = int((~torch.isfinite(rounded)).sum())
        if bad:
            rounded = torch.where(torch.isnan(rounded), torch.full_like(rounded, float("nan")), rounded)
        # Last, for it may lie over an input: until here the block can be done again.
        self._host(out, a, b).copy_(rounded, non_blocking=True)
        synchronize(self._device)
        return bad


def _finite(values: torch.Tensor) -> torch.Tensor:
    """Return values with 0 in place of what is not finite, which has no part in sums."""
    return values.masked_fill(~values.isfinite(), 0.0)


def round_to(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Round once, to nearest even, to an output dtype; fp64 does not pass through a rounded fp32.

    torch casts fp64 to 16 bits by way of fp32, which rounds twice: here the step in between is
    round-to-odd, after which the second rounding is the only one.
    """
    import torch

    target = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    if values.dtype != torch.float64 or target.itemsize != 2:
        return values.to(target)
    single = values.float()
    bits = single.view(torch.int32)
    inexact = (single.double() != values) & ~torch.isnan(values)
    away = single.double().abs() > values.abs()
    odd = (bits - away.int()) | 1
    return torch.where(inexact, odd, bits).view(torch.float32).to(target)
