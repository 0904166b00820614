"""A block through the torch formulas: the reference, users' own methods, fp64, and the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Applied, Bins, Block, Counts, Operand, operand_bytes
from streammerge.algebra.extent import Extent
from streammerge.algebra.gram_matrix import full_matrices, rows_at_once
from streammerge.algebra.rules import (
    ColumnCombination,
    Formula,
    RowCombination,
    Rule,
    TaskVectorMerge,
    ranked,
    removing,
    touched_entries,
)
from streammerge.algebra.scores import Score, Selection, sees_rows
from streammerge.algebra.task_vectors import TaskVector, Where, terms_of
from streammerge.backends.torch.gpu import free_unused, synchronize
from streammerge.errors import InputError, WorldError, blamed_on, printable
from streammerge.io.buffer_pool import Bytes
from streammerge.numerics.casts import round_to, torch_dtype
from streammerge.numerics.ordered_sum import BLOCK, block_sums

if TYPE_CHECKING:
    import torch

_HITS_AT_ONCE = 1 << 22
_Result = TypeVar("_Result")


class TorchMath:
    """A block on a torch device; statistics are integers or fixed-order sums, equal to the kernels'.

    Parameters
    ----------
    loaded
        The block.
    device
        ``cpu`` or ``cuda[:N]``.
    block
        Elements worked on at a time where the formula may be cut anywhere.
    keep
        Whether the block's operands fit the device's memory whole: they are then copied there once, however often
        they are passed over.
    """

    def __init__(self, loaded: Block, device: str, block: int, *, keep: bool = False) -> None:
        self._loaded = loaded
        self._device = device
        self._block = block
        self._keep = keep
        self._kept: dict[Operand, torch.Tensor] = {}
        self._divergences: dict[tuple[int, int], dict[object, torch.Tensor]] = {}

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
        while start < self._loaded.n:
            stop = min(self._loaded.n, start + size)
            try:
                result = run(start, stop)
            except torch.OutOfMemoryError:
                if not self._keep:
                    size = min(size, stop - start) // 2 // divisor * divisor
                self._keep = False
                self._kept.clear()
                if size < divisor or not self._block:
                    raise WorldError(
                        f"tensor {printable(self._loaded.tensor)}: {self._device} has no memory left for it; free "
                        "some, or merge with --device cpu"
                    ) from None
                free_unused(self._device)
                continue
            yield result
            start = stop

    def _tensor(self, operand: Operand, a: int, b: int) -> torch.Tensor:
        if self._keep:
            if operand not in self._kept:
                whole = self._host(operand, 0, self._loaded.n)
                self._kept[operand] = whole.to(self._device, non_blocking=True)
            values = self._kept[operand][a:b]
        else:
            values = self._host(operand, a, b).to(self._device, non_blocking=True)
        return values.clone() if operand.dtype == "F64" else values.float()

    def _host(self, operand: Operand, a: int, b: int) -> torch.Tensor:
        """Return a view of an operand's bytes in the buffer."""
        import torch

        width = operand_bytes(operand, 1)
        raw: Bytes = self._loaded.arena[operand.offset + a * width : operand.offset + b * width]
        return torch.from_numpy(raw).view(torch_dtype(operand.dtype))

    def _inputs(self, a: int, b: int) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        import torch

        base = self._tensor(self._loaded.base, a, b) if self._loaded.base is not None else None
        models = [self._tensor(operand, a, b) for operand in self._loaded.models]
        if any(tensor.dtype == torch.float64 for tensor in [*models, *([] if base is None else [base])]):
            models = [model.double() for model in models]
            base = None if base is None else base.double()
        return models, base

    def _fishers(self, a: int, b: int) -> list[torch.Tensor]:
        return [self._tensor(operand, a, b) for operand in self._loaded.fishers]

    def _where(self, a: int, b: int) -> Where:
        loaded = self._loaded
        known = self._divergences.setdefault((a, b), {})
        return Where(loaded.tensor, loaded.start + a, loaded.keys, loaded.row_length, divergences=known)

    def _surviving(self, vector: TaskVector, a: int, b: int) -> torch.Tensor:
        models, base = self._inputs(a, b)
        assert base is not None
        return vector.surviving(models[vector.model], base, self._where(a, b))

    def _patterns(self, vector: TaskVector | Score, a: int, b: int) -> torch.Tensor:
        import torch

        if not isinstance(vector, TaskVector):
            models, base = self._inputs(a, b)
            assert base is not None
            return vector.patterns(models, base, self._where(a, b))
        delta = self._surviving(vector, a, b).float()
        return delta.view(torch.int32) & 0x7FFFFFFF

    def count_keys(
        self, vector: TaskVector | Score, low: int, high: int, shift: int, bins: Bins
    ) -> tuple[int, int]:
        """See `BlockMath`."""
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

        for more, top, hit in self._each(count, self._row_of(vector)):
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
        """See `BlockMath`."""

        def sums(a: int, b: int) -> NDArray[np.float64]:
            return block_sums(_finite(self._surviving(vector, a, b)).double().abs().cpu().numpy())

        step = BLOCK if vector.rank_drop is None else math.lcm(BLOCK, self._loaded.row_length)
        partials = list(self._each(sums, step))
        return np.concatenate(partials) if partials else np.zeros(0)

    def fisher_squares(self, model: int) -> tuple[NDArray[np.float64], int]:
        """See `BlockMath`."""

        def sums(a: int, b: int) -> tuple[NDArray[np.float64], int]:
            values = self._fishers(a, b)[model].double().cpu().numpy()
            return block_sums(values * values), int((~(values >= 0) | np.isinf(values)).sum())

        found = list(self._each(sums, BLOCK))
        partials = [partial for partial, _ in found]
        return np.concatenate(partials) if partials else np.zeros(0), sum(bad for _, bad in found)

    def _row_of(self, vector: TaskVector | Score) -> int:
        """Return of how many elements a multiple is ranked at a time."""
        return self._loaded.row_length if sees_rows(vector) else 1

    def squares(self, vectors: tuple[TaskVector, ...], selection: Selection | None) -> NDArray[np.float64]:
        """See `BlockMath`."""

        def sums(a: int, b: int) -> NDArray[np.float64]:
            models, base = self._inputs(a, b)
            assert base is not None
            where = self._where(a, b)
            selected = None if selection is None else selection.mask(models, base, where)
            columns = []
            for vector in vectors:
                left = _finite(vector.surviving(models[vector.model], base, where)).double() * vector.rescale
                left = left if selected is None else left.masked_fill(~selected, 0.0)
                columns.append(block_sums((left * left).cpu().numpy()))
            return np.stack(columns, axis=1)

        return np.concatenate(list(self._each(sums, BLOCK)))

    def touches(self, vectors: tuple[TaskVector, ...], epsilon: float) -> Counts:
        """See `BlockMath`."""

        def count(a: int, b: int) -> Counts:
            import torch

            models, base = self._inputs(a, b)
            assert base is not None
            entries = touched_entries(vectors, epsilon, models, base, self._where(a, b))
            touched = torch.stack([mask for _, mask in entries])
            by = touched.sum(dim=0)
            alone, shared = (touched & (by == 1)).sum(dim=1), (touched & (by > 1)).sum(dim=1)
            counts: Counts = torch.stack([alone, shared]).cpu().numpy()
            return counts

        return np.sum(list(self._each(count)), axis=0)

    def own_squares(self) -> NDArray[np.float64]:
        """See `BlockMath`."""

        def sums(a: int, b: int) -> NDArray[np.float64]:
            models, base = self._inputs(a, b)
            tensors = [*([] if base is None else [base]), *models]
            squares = [_finite(tensor).double() for tensor in tensors]
            return np.stack([block_sums((one * one).cpu().numpy()) for one in squares], axis=1)

        return np.concatenate(list(self._each(sums, BLOCK)))

    def agreements(self, vectors: tuple[TaskVector, ...]) -> Counts:
        """See `BlockMath`."""

        def count(a: int, b: int) -> Counts:
            import torch

            models, base = self._inputs(a, b)
            assert base is not None
            where = self._where(a, b)
            left = torch.stack([vector.surviving(models[vector.model], base, where) for vector in vectors])
            ups, downs = (left > 0).sum(dim=0), (left < 0).sum(dim=0)
            conflict = (ups > 0) & (downs > 0)
            agree = (ups + downs > 1) & ~conflict
            counts: Counts = torch.stack([agree.sum(), conflict.sum()]).cpu().numpy()
            return counts

        return np.sum(list(self._each(count)), axis=0)

    def ties(self, vector: TaskVector | Score, key: int, size: int) -> Counts:
        """See `BlockMath`."""

        def find(a: int, b: int) -> NDArray[np.int64]:
            places: NDArray[np.int64] = (
                (self._patterns(vector, a, b) == key).nonzero().flatten().cpu().numpy()
            )
            return places + a

        counts = np.zeros(-(-self._loaded.n // size), np.int64)
        for places in self._each(find, self._row_of(vector)):
            counts += np.bincount(places // size, minlength=len(counts))
        return counts

    def dots(self, vectors: Sequence[TaskVector], length: int) -> NDArray[np.float64]:
        """See `BlockMath`."""

        def sums(a: int, b: int) -> NDArray[np.float64]:
            models, base = self._inputs(a, b)
            return self._dots(vectors, models, base, self._where(a, b), length)

        return np.concatenate(list(self._each(sums, length)))

    def _dots(
        self,
        vectors: Sequence[TaskVector],
        models: list[torch.Tensor],
        base: torch.Tensor | None,
        where: Where,
        length: int,
    ) -> NDArray[np.float64]:
        terms = self._terms(vectors, models, base, where)
        pairs = [terms[i] * terms[j] for i in range(len(terms)) for j in range(i, len(terms))]
        return np.stack([block_sums(pair.flatten().cpu().numpy(), length) for pair in pairs], axis=1)

    @staticmethod
    def _terms(
        vectors: Sequence[TaskVector], models: list[torch.Tensor], base: torch.Tensor | None, where: Where
    ) -> list[torch.Tensor]:
        """Return the vectors whose products are summed, fp64: what is not finite has no part in sums."""
        terms = [_finite(term).double() for term in terms_of(vectors, models, base, where)]
        for i, vector in enumerate(vectors):
            terms[i] = vector.rescale * terms[i]
        return terms

    def _combine_columns(
        self, rule: ColumnCombination, models: list[torch.Tensor], base: torch.Tensor | None, where: Where
    ) -> torch.Tensor:
        import torch

        length = self._loaded.row_length
        rows = [model.reshape(-1, length) for model in models]
        shaped = None if base is None else base.reshape(-1, length)
        weights = torch.from_numpy(rule.weights).to(self._device)
        return rule.combined(rows, shaped, where, weights).reshape(-1)

    def _combine_rows(
        self, rule: RowCombination, models: list[torch.Tensor], base: torch.Tensor | None, where: Where
    ) -> torch.Tensor:
        import torch

        length = self._loaded.row_length
        k = len(rule.vectors) or len(models) + (base is not None)
        pairs = self._dots(rule.vectors, models, base, where, length)
        weights = np.ascontiguousarray(rule.coefficients(full_matrices(pairs, k)))
        rows = [model.reshape(-1, length) for model in models]
        shaped = None if base is None else base.reshape(-1, length)
        merged = rule.combined(rows, shaped, where, torch.from_numpy(weights).to(self._device))
        return merged.reshape(-1)

    def add_column_dots(self, vectors: Sequence[TaskVector], sums: NDArray[np.float64]) -> None:
        """See `BlockMath`."""
        columns = self._loaded.row_length
        at_once = rows_at_once(columns)

        def products(a: int, b: int) -> tuple[NDArray[np.float64], ...]:
            """Return (pairs, rows, columns): rows that end a sum begun before, sums of whole runs of rows, and the rest."""
            models, base = self._inputs(a, b)
            terms = self._terms(vectors, models, base, self._where(a, b))
            rows = [term.reshape(-1, columns) for term in terms]
            first = min(len(rows[0]), -(a // columns) % at_once)
            last = first + (len(rows[0]) - first) // at_once * at_once
            pairs = [(x, y) for i, x in enumerate(rows) for y in rows[i:]]
            return (
                _stacked([x[:first] * y[:first] for x, y in pairs]),
                _stacked([_sums_of_rows(x[first:last], y[first:last], at_once) for x, y in pairs]),
                _stacked([x[last:] * y[last:] for x, y in pairs]),
            )

        part, waiting = np.zeros_like(sums), 0
        for before, whole, after in self._each(products, columns):
            for row in range(before.shape[1]):
                part += before[:, row]
            waiting = (waiting + before.shape[1]) % at_once
            if not waiting:
                sums += part
                part[:] = 0.0
            for run in range(whole.shape[1]):
                sums += whole[:, run]
            for row in range(after.shape[1]):
                part += after[:, row]
            waiting += after.shape[1]
        sums += part

    def sign_total(self, merge: TaskVectorMerge) -> int:
        """See `BlockMath`."""

        def total(a: int, b: int) -> int:
            models, base = self._inputs(a, b)
            assert base is not None
            return merge.sign_total(models, base, self._where(a, b))

        return sum(self._each(total, self._loaded.row_length if ranked(merge) else 1))

    def apply(self, rule: Rule, out: Operand) -> Applied:
        """See `BlockMath`."""
        n_vectors = len(removing(rule))

        def merge(a: int, b: int) -> Applied:
            models, base = self._inputs(a, b)
            where = self._where(a, b)
            fishers = self._fishers(a, b)
            kept = rule.kept(models, base, where)
            bad, floored = rule.look_at_fishers(fishers)
            merged = self._call(rule, models, base, where, fishers)
            return Applied(bad + self._store(merged, out, a, b), kept, floored)

        by_rows = len(self._loaded.shape) > 1 or rule.extent == Extent.ROW
        row = rule.rows_at_once * (self._loaded.row_length if by_rows else 1)
        parts = list(self._each(merge, row if self._block else max(1, self._loaded.n)))
        kept = tuple(sum(part.kept[i] for part in parts) for i in range(n_vectors))
        return Applied(sum(part.not_finite for part in parts), kept, sum(part.floored for part in parts))

    def _call(
        self,
        rule: Rule,
        models: list[torch.Tensor],
        base: torch.Tensor | None,
        where: Where,
        fishers: list[torch.Tensor],
    ) -> torch.Tensor:
        own = _OWN.get(type(rule))
        return rule(models, base, where, fishers) if own is None else own(self, rule, models, base, where)

    def _call_formula(
        self, rule: Formula, models: list[torch.Tensor], base: torch.Tensor | None, where: Where
    ) -> torch.Tensor:
        import torch

        models = rule.dropped(models, base, where)
        shape = self._loaded.shape if len(self._loaded.shape) != 1 else (-1,)
        if self._block and len(shape) > 1:
            shape = (-1, shape[-1])
        shaped = [model.reshape(shape) for model in models]
        with blamed_on(rule.method, self._loaded.tensor):
            merged = rule(shaped, None if base is None else base.reshape(shape), where)
        what: str | None = None
        if not isinstance(merged, torch.Tensor) or merged.shape != shaped[0].shape:
            found = tuple(merged.shape) if isinstance(merged, torch.Tensor) else type(merged).__name__
            what = f"{found}, not a tensor of shape {tuple(shaped[0].shape)}"
        elif not merged.dtype.is_floating_point:
            what = f"{str(merged.dtype).removeprefix('torch.')} numbers, not floating-point ones: call .float() on them"
        if what is not None:
            name, tensor = printable(rule.method), printable(self._loaded.tensor)
            raise InputError(f"method {name!r}: of tensor {tensor} it returned {what}")
        return merged.detach().reshape(-1)

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


_OWN: Mapping[type[Rule], Callable[..., torch.Tensor]] = {
    RowCombination: TorchMath._combine_rows,
    ColumnCombination: TorchMath._combine_columns,
    Formula: TorchMath._call_formula,
}
"""What computes rules that are more than a formula of pieces; all others are called."""


def _stacked(tensors: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    import torch

    stacked: NDArray[np.float64] = torch.stack(list(tensors)).cpu().numpy()
    return stacked


def _sums_of_rows(x: torch.Tensor, y: torch.Tensor, at_once: int) -> torch.Tensor:
    """Return the sums of products over each run of `at_once` rows, row after row, (runs, columns)."""
    x, y = (rows.reshape(-1, at_once, rows.shape[1]) for rows in (x, y))
    total = x.new_zeros(x.shape[0], x.shape[2])
    for row in range(at_once):
        total = total + x[:, row] * y[:, row]
    return total


def _finite(values: torch.Tensor) -> torch.Tensor:
    """Return values with 0 in place of what is not finite, which has no part in sums."""
    return values.masked_fill(~values.isfinite(), 0.0)
