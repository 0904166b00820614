"""A loaded piece through the torch formulas: the reference, users' own methods, fp64, and the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streammerge.engine.memory import Bytes
from streammerge.engine.pieces import Applied, Bins, Counts, Loaded, Operand, operand_bytes
from streammerge.engine.statistics import block_sums
from streammerge.errors import InputError, printable
from streammerge.methods.recipes import (
    CopyOf,
    FisherMean,
    Formula,
    Recipe,
    TaskVector,
    TaskVectorMerge,
    WeightedSum,
    Where,
    removing,
)

if TYPE_CHECKING:
    import torch

_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.int16}


class TorchMath:
    """A piece on a torch device; statistics are integers or fixed-order sums, equal to the kernels'.

    Parameters
    ----------
    device
        ``cpu`` or ``cuda[:N]``.
    block
        Elements worked on at a time where the formula may be cut anywhere.
    """

    def __init__(self, piece: Loaded, device: str, block: int) -> None:
        self._piece = piece
        self._device = device
        self._block = block

    def _blocks(self, divisor: int = 1) -> list[tuple[int, int]]:
        size = max(divisor, self._block // divisor * divisor)
        return [(a, min(self._piece.n, a + size)) for a in range(0, self._piece.n, size)]

    def _tensor(self, operand: Operand, a: int, b: int) -> torch.Tensor:
        import torch

        width = operand_bytes(operand, 1)
        raw: Bytes = self._piece.arena[operand.offset + a * width : operand.offset + b * width]
        values = torch.from_numpy(raw.view(_NUMPY[operand.dtype]))
        if operand.dtype == "BF16":
            values = values.view(torch.bfloat16)
        values = values.to(self._device)
        return values.clone() if operand.dtype == "F64" else values.float()

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
        return Where(self._piece.tensor, self._piece.start + a, self._piece.keys)

    def _surviving(self, vector: TaskVector, a: int, b: int) -> torch.Tensor:
        models, base = self._inputs(a, b)
        assert base is not None
        return vector.surviving(models[vector.model], base, self._where(a))

    def _patterns(self, vector: TaskVector, a: int, b: int) -> NDArray[np.int64]:
        import torch

        delta = self._surviving(vector, a, b).float()
        return (delta.view(torch.int32) & 0x7FFFFFFF).cpu().numpy().astype(np.int64)

    def count_keys(self, vector: TaskVector, low: int, high: int, shift: int, bins: Bins) -> tuple[int, int]:
        """See `PieceMath`."""
        above = highest = 0
        for a, b in self._blocks():
            keys = self._patterns(vector, a, b)
            above += int((keys > high).sum())
            highest = max(highest, int(keys.max(initial=0)))
            inside = keys[(keys >= low) & (keys <= high)]
            bins += np.bincount((inside - low) >> shift, minlength=len(bins)).astype(np.int32)
        return above, highest

    def abs_sums(self, vector: TaskVector) -> NDArray[np.float64]:
        """See `PieceMath`."""
        partials = [
            block_sums(np.abs(self._surviving(vector, a, b).double().cpu().numpy()))
            for a, b in self._blocks(4096)
        ]
        return np.concatenate(partials) if partials else np.zeros(0)

    def fisher_squares(self, model: int) -> tuple[NDArray[np.float64], int]:
        """See `PieceMath`."""
        partials, bad = [], 0
        for a, b in self._blocks(4096):
            values = self._fishers(a, b)[model].double().cpu().numpy()
            bad += int((~(values >= 0) | np.isinf(values)).sum())
            partials.append(block_sums(values * values))
        return np.concatenate(partials) if partials else np.zeros(0), bad

    def ties(self, vector: TaskVector, key: int, size: int) -> Counts:
        """See `PieceMath`."""
        counts = np.zeros(-(-self._piece.n // size), np.int64)
        for a, b in self._blocks():
            found = np.flatnonzero(self._patterns(vector, a, b) == key) + a
            counts += np.bincount(found // size, minlength=len(counts))
        return counts

    def sign_total(self, merge: TaskVectorMerge) -> int:
        """See `PieceMath`."""
        total = 0
        for a, b in self._blocks():
            models, base = self._inputs(a, b)
            assert base is not None
            total += merge.sign_total(models, base, self._where(a))
        return total

    def apply(self, recipe: Recipe, out: Operand) -> Applied:
        """See `PieceMath`."""
        if isinstance(recipe, CopyOf):
            recipe = WeightedSum(tuple(float(i == recipe.model) for i in range(len(self._piece.models))))
        bad = floored = 0
        vectors = removing(recipe)
        kept = [0] * len(vectors)
        row = self._piece.shape[-1] if len(self._piece.shape) > 1 else 1
        blocks = self._blocks(row) if self._block else [(0, self._piece.n)]
        for a, b in blocks:
            models, base = self._inputs(a, b)
            where = self._where(a)
            fishers = self._fishers(a, b)
            for i, vector in enumerate(vectors):
                assert base is not None
                kept[i] += int(vector.mask(models[i], base, where).sum())
            if isinstance(recipe, FisherMean):
                floored += recipe.decided_by_floor(fishers)
                bad += sum(int((fisher < 0).sum()) for fisher in fishers)
            merged = self._call(recipe, models, base, where, fishers)
            bad += self._store(merged, out, a, b)
        return Applied(bad, tuple(kept), floored)

    def _call(
        self, recipe: Recipe, models: list[torch.Tensor], base: torch.Tensor | None, where: Where,
        fishers: list[torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        import torch

        assert not isinstance(recipe, CopyOf)
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
        width = operand_bytes(out, 1)
        target = self._piece.arena[out.offset + a * width : out.offset + b * width]
        if out.dtype == "BF16":
            rounded = rounded.view(torch.int16)
        target[:] = rounded.cpu().numpy().view(np.uint8)
        return bad


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
