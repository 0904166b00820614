"""Merges of elements near thresholds that are not known yet: finds them, and settles them when they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Applied, Bins, BlockMath, Operand
from streammerge.algebra.brackets import uncut
from streammerge.algebra.rules import TaskVectorMerge
from streammerge.algebra.task_vectors import Cut, TaskVector
from streammerge.backends.cpu.memory import TIES, BlockMemory, kernels
from streammerge.backends.cpu.registry import VECTORS, answers, example
from streammerge.backends.cpu.rules import run_merge
from streammerge.numerics.ordered_sum import BLOCK

GROUP = "undecided"
"""The group of kernels that settling calls."""


class Settling:
    """The part of `KernelMath` that settles elements; see `SettlingMath` for what the methods return."""

    _memory: BlockMemory

    def patterns(self, vector: TaskVector) -> NDArray[np.uint32]:
        """See `SettlingMath`."""
        n = self._memory.block.n
        found = np.empty(n, np.uint32)
        base, deltas = np.empty(BLOCK, np.float32), np.empty((1, BLOCK), np.float32)
        for first in range(0, n, BLOCK):
            m = min(BLOCK, n - first)
            self._memory.survivors((vector,), first, base[:m], deltas[:, :m])
            found[first : first + m] = deltas[0, :m].view(np.uint32) & 0x7FFFFFFF
        return found

    @answers(GROUP)
    def mark_undecided(
        self, vector: TaskVector, low: Cut, high: Cut, bins: Bins, marks: NDArray[np.uint8]
    ) -> tuple[int, int]:
        """See `SettlingMath`."""
        memory, loops = self._memory, kernels().undecided
        mask = memory.masks((vector,), cut=False)
        mask = mask._replace(cut_keys=memory.masks((vector,)).cut_keys)
        bounds = kernels().operands.Bounds(TIES[low.ties], low.key, low.limit, high.key, high.limit)
        pair = memory.pair(vector)
        above, highest = loops.mark_undecided(*pair, memory.span(), mask, bounds, bins, marks)
        return int(above), int(highest)

    @answers(GROUP)
    def settle(
        self, trial: TaskVectorMerge, rule: TaskVectorMerge, elements: NDArray[np.int64], out: Operand
    ) -> Applied:
        """See `SettlingMath`."""
        memory, loops = self._memory, kernels().undecided
        assert memory.block.base is not None
        models, base = memory.operands(memory.block.models), memory.operand(memory.block.base)
        change = np.zeros(len(rule.vectors), np.int64)
        before, after = memory.masks(trial.vectors), memory.masks(rule.vectors)
        loops.remove_dropped(models, base, elements, before, after, change)
        bad, _ = run_merge(memory, uncut(rule), memory.operand(out))
        return Applied(int(bad), tuple(map(int, change)))


@example(GROUP)
def _undecided(math: BlockMath) -> None:
    from streammerge.kernels.operands import F32, Operand, Operands

    assert isinstance(math, Settling)
    cut = Cut(0, "thin")
    math.patterns(VECTORS[0])
    math.mark_undecided(VECTORS[0], cut, cut, np.zeros(1, np.int32), np.zeros(8, np.uint8))
    memory, buffer = math._memory, np.zeros(64, np.uint8)
    half, full = buffer.view(np.uint16), buffer.view(np.uint32)
    models = Operands(half, full, np.zeros(1, np.int64), np.zeros(1, np.int64))
    masks, change = memory.masks(VECTORS[:1]), np.zeros(1, np.int64)
    kernels().undecided.remove_dropped(
        models, Operand(half, full, 32, F32), np.zeros(1, np.int64), masks, masks, change
    )
