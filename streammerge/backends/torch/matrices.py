"""Merges of whole matrices: task vectors are made from the block when a rule asks for them, one at a time."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING

from streammerge.algebra.block import Applied, Block, Operand
from streammerge.algebra.rules.matrix_merge import AT_ONCE, MatrixMerge, Part, Read
from streammerge.backends.torch.device_block import DeviceBlock, DeviceHooks
from streammerge.backends.torch.returned import free_packed

if TYPE_CHECKING:
    import torch

_ALONE = threading.Lock()
"""Held while a matrix is on a GPU: one takes much of its memory, and all of its arithmetic."""


def apply_to_matrices(
    block: Block, rule: MatrixMerge, out: Operand, device: str, hooks: DeviceHooks
) -> Applied:
    """Merge every matrix of a block and write it; the output may overlay the base, which is read part by part.

    Task vectors are made on the device and decomposed there, in fp64. The last bits of decompositions and of matrix products
    are the device's.

    Raises
    ------
    WorldError
        If the device's memory does not hold a matrix and what its rule takes.
    """
    import torch

    on = DeviceBlock(block, device, 0, hooks=hooks)
    assert block.base is not None
    base = block.base
    place = torch.device(device)
    one_by_one: AbstractContextManager[object] = nullcontext() if place.type == "cpu" else _ALONE

    def read(model: int, a: int, b: int) -> Part:
        return Part(on.tensor(block.models[model], a, b), on.tensor(base, a, b), on.where(a))

    applied = Applied(0, ())
    for first in range(0, block.n, rule.size):
        with one_by_one:
            change, kept = _change(rule, read, first, on, place)
            free_packed()
            bad = 0
            for a in range(0, rule.size, AT_ONCE):
                b = min(rule.size, a + AT_ONCE)
                theta_0 = on.tensor(base, first + a, first + b).double()
                bad += on.store(theta_0 + change[a:b], out, first + a, first + b)
            del change
        applied = applied.plus(Applied(bad, kept))
    return applied


def _change(
    rule: MatrixMerge, read: Read, first: int, on: DeviceBlock, place: torch.device
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return what `MatrixMerge.change` does, a second time where memory that is kept for other streams was in its way."""
    import torch

    with suppress(torch.OutOfMemoryError):
        return rule.change(read, first, place)
    on.free_unused()
    try:
        return rule.change(read, first, place)
    except torch.OutOfMemoryError:
        raise on.out_of_memory() from None
