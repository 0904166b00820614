"""`BlockMath` by torch formulas: the reference, users' own methods, fp64, and GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Applied, Bins, Block, Counts, Operand
from streammerge.algebra.extent import Extent
from streammerge.algebra.gram_matrix import rows_at_once
from streammerge.algebra.rules import MatrixMerge, Rule, TaskVectorMerge, ranked, removing, touched_entries
from streammerge.algebra.scores import Ranked, Selection
from streammerge.algebra.task_vectors import TaskVector
from streammerge.backends.torch.device_block import HOST, DeviceBlock, DeviceHooks
from streammerge.backends.torch.matrices import apply_to_matrices
from streammerge.backends.torch.rules import merged_by
from streammerge.backends.torch.sums import dot_products, finite, products_of_rows
from streammerge.numerics.ordered_sum import BLOCK, block_sums

if TYPE_CHECKING:
    import torch

_HITS_AT_ONCE = 1 << 22


class TorchMath:
    """`BlockMath` on a torch device. Statistics are integers or fixed-order sums, equal to the kernels'.

    Parameters
    ----------
    block, device, at_once, keep, hooks
        See `DeviceBlock`.
    """

    def __init__(
        self, block: Block, device: str, at_once: int, *, keep: bool = False, hooks: DeviceHooks = HOST
    ) -> None:
        self._block, self._device, self._hooks = block, device, hooks
        self._on = DeviceBlock(block, device, at_once, keep=keep, hooks=hooks)

    def _surviving(self, vector: TaskVector, a: int, b: int) -> torch.Tensor:
        inputs = self._on.inputs(a, b)
        return vector.surviving(inputs.models[vector.model], inputs.theta_0, inputs.where)

    def _patterns(self, subject: Ranked, a: int, b: int) -> torch.Tensor:
        inputs = self._on.inputs(a, b)
        return subject.patterns(inputs.models, inputs.theta_0, inputs.where)

    def _unit(self, subject: Ranked) -> int:
        """Return the number of elements whose multiples are ranked at a time."""
        return self._block.row_length if subject.sees_rows else 1

    def count_keys(self, subject: Ranked, low: int, high: int, shift: int, bins: Bins) -> tuple[int, int]:
        """See `BlockMath`."""
        import torch

        def count(a: int, b: int) -> tuple[int, int, torch.Tensor]:
            keys = self._patterns(subject, a, b)
            inside = keys[(keys >= low) & (keys <= high)]
            return int((keys > high).sum()), int(keys.max()), (inside - low) >> shift

        above = highest = waiting = 0
        hits: list[torch.Tensor] = []

        def add_up() -> None:  # few hits per block, many bins: adding bins for each block would cost more
            if hits:
                counted = torch.bincount(torch.cat(hits), minlength=len(bins))
                bins[:] += counted.cpu().numpy().astype(np.int32)
                hits.clear()

        for more, top, hit in self._on.each(count, self._unit(subject)):
            above += more
            highest = max(highest, top)
            hits.append(hit)
            waiting += hit.numel()
            if waiting >= _HITS_AT_ONCE:
                add_up()
                waiting = 0
        add_up()
        return above, highest

    def ties(self, subject: Ranked, key: int, size: int) -> Counts:
        """See `BlockMath`."""

        def find(a: int, b: int) -> NDArray[np.int64]:
            found = (self._patterns(subject, a, b) == key).nonzero().flatten()
            places: NDArray[np.int64] = found.cpu().numpy()
            return places + a

        counts = np.zeros(-(-self._block.n // size), np.int64)
        for places in self._on.each(find, self._unit(subject)):
            counts += np.bincount(places // size, minlength=len(counts))
        return counts

    def abs_sums(self, vector: TaskVector) -> NDArray[np.float64]:
        """See `BlockMath`."""

        def sums(a: int, b: int) -> NDArray[np.float64]:
            return block_sums(finite(self._surviving(vector, a, b)).double().abs().cpu().numpy())

        step = BLOCK if vector.rank_drop is None else math.lcm(BLOCK, self._block.row_length)
        partials = list(self._on.each(sums, step))
        return np.concatenate(partials) if partials else np.zeros(0)

    def fisher_squares(self, model: int) -> tuple[NDArray[np.float64], int]:
        """See `BlockMath`."""

        def sums(a: int, b: int) -> tuple[NDArray[np.float64], int]:
            values = self._on.fishers(a, b)[model].double().cpu().numpy()
            return block_sums(values * values), int((~(values >= 0) | np.isinf(values)).sum())

        found = list(self._on.each(sums, BLOCK))
        partials = [partial for partial, _ in found]
        return np.concatenate(partials) if partials else np.zeros(0), sum(bad for _, bad in found)

    def squares(self, vectors: tuple[TaskVector, ...], selection: Selection | None) -> NDArray[np.float64]:
        """See `BlockMath`."""

        def sums(a: int, b: int) -> NDArray[np.float64]:
            inputs = self._on.inputs(a, b)
            models, base, where = inputs.models, inputs.theta_0, inputs.where
            selected = None if selection is None else selection.mask(models, base, where)
            columns = []
            for vector in vectors:
                left = finite(vector.surviving(models[vector.model], base, where)).double() * vector.rescale
                left = left if selected is None else left.masked_fill(~selected, 0.0)
                columns.append(block_sums((left * left).cpu().numpy()))
            return np.stack(columns, axis=1)

        return np.concatenate(list(self._on.each(sums, BLOCK)))

    def touches(self, vectors: tuple[TaskVector, ...], epsilon: float) -> Counts:
        """See `BlockMath`."""

        def count(a: int, b: int) -> Counts:
            import torch

            entries = touched_entries(vectors, epsilon, self._on.inputs(a, b))
            touched = torch.stack([mask for _, mask in entries])
            by = touched.sum(dim=0)
            alone, shared = (touched & (by == 1)).sum(dim=1), (touched & (by > 1)).sum(dim=1)
            counts: Counts = torch.stack([alone, shared]).cpu().numpy()
            return counts

        return np.sum(list(self._on.each(count)), axis=0)

    def own_squares(self) -> NDArray[np.float64]:
        """See `BlockMath`."""

        def sums(a: int, b: int) -> NDArray[np.float64]:
            inputs = self._on.inputs(a, b)
            tensors = [*([] if inputs.base is None else [inputs.base]), *inputs.models]
            squares = [finite(tensor).double() for tensor in tensors]
            return np.stack([block_sums((one * one).cpu().numpy()) for one in squares], axis=1)

        return np.concatenate(list(self._on.each(sums, BLOCK)))

    def agreements(self, vectors: tuple[TaskVector, ...]) -> Counts:
        """See `BlockMath`."""

        def count(a: int, b: int) -> Counts:
            import torch

            inputs = self._on.inputs(a, b)
            models, base, where = inputs.models, inputs.theta_0, inputs.where
            left = torch.stack([vector.surviving(models[vector.model], base, where) for vector in vectors])
            ups, downs = (left > 0).sum(dim=0), (left < 0).sum(dim=0)
            conflict = (ups > 0) & (downs > 0)
            agree = (ups + downs > 1) & ~conflict
            counts: Counts = torch.stack([agree.sum(), conflict.sum()]).cpu().numpy()
            return counts

        return np.sum(list(self._on.each(count)), axis=0)

    def dots(self, vectors: Sequence[TaskVector], length: int) -> NDArray[np.float64]:
        """See `BlockMath`."""

        def sums(a: int, b: int) -> NDArray[np.float64]:
            return dot_products(vectors, self._on.inputs(a, b), length)

        return np.concatenate(list(self._on.each(sums, length)))

    def add_column_dots(self, vectors: Sequence[TaskVector], sums: NDArray[np.float64]) -> None:
        """See `BlockMath`."""
        columns = self._block.row_length
        at_once = rows_at_once(columns)

        def products(a: int, b: int) -> tuple[NDArray[np.float64], ...]:
            return products_of_rows(vectors, self._on.inputs(a, b), columns, a // columns, at_once)

        part, waiting = np.zeros_like(sums), 0
        for before, whole, after in self._on.each(products, columns):
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
            return merge.sign_total(self._on.inputs(a, b))

        return sum(self._on.each(total, self._block.row_length if ranked(merge) else 1))

    def apply(self, rule: Rule, out: Operand) -> Applied:
        """See `BlockMath`."""
        on, block = self._on, self._block
        if isinstance(rule, MatrixMerge):
            return apply_to_matrices(block, rule, out, self._device, self._hooks)

        def merge(a: int, b: int) -> Applied:
            inputs = on.inputs(a, b)._replace(fishers=on.fishers(a, b))
            kept = rule.kept(inputs)
            bad, floored = rule.look_at_fishers(inputs.fishers)
            return Applied(bad + on.store(merged_by(rule, on, inputs), out, a, b), kept, floored)

        by_rows = len(block.shape) > 1 or rule.extent == Extent.ROW
        row = rule.rows_at_once * (block.row_length if by_rows else 1)
        parts = list(on.each(merge, row if on.at_once else max(1, block.n)))
        kept = tuple(sum(part.kept[i] for part in parts) for i in range(len(removing(rule))))
        return Applied(sum(part.not_finite for part in parts), kept, sum(part.floored for part in parts))
