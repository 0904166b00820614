"""Merges of whole matrices: task vectors are made from the block when a rule asks for them, one at a time."""

from __future__ import annotations

from streammerge.algebra.block import Applied, Block, Operand
from streammerge.algebra.rules.matrix_merge import AT_ONCE, MatrixMerge, Part
from streammerge.backends.torch.device_block import DeviceBlock
from streammerge.backends.torch.returned import free_packed


def apply_to_matrices(block: Block, rule: MatrixMerge, out: Operand) -> Applied:
    """Merge every matrix of a block and write it; the output may overlay the base, which is read part by part.

    It runs on the CPU in every merge, since the decompositions of a GPU have other last bits.
    """
    on = DeviceBlock(block, "cpu", 0)
    assert block.base is not None
    base = block.base

    def read(model: int, a: int, b: int) -> Part:
        return Part(on.tensor(block.models[model], a, b), on.tensor(base, a, b), on.where(a))

    applied = Applied(0, ())
    for first in range(0, block.n, rule.size):
        change, kept = rule.change(read, first)
        free_packed()
        bad = 0
        for a in range(0, rule.size, AT_ONCE):
            b = min(rule.size, a + AT_ONCE)
            theta_0 = on.tensor(base, first + a, first + b).double()
            bad += on.store(theta_0 + change[a:b], out, first + a, first + b)
        applied = applied.plus(Applied(bad, kept))
    return applied
