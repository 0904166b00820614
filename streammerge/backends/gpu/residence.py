"""Operands that lie in the arena of a device: the residence of the fused kernels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from streammerge.algebra.block import Block, Operand, operand_bytes
from streammerge.backends.fused.launcher import Launcher


class InArena:
    """See `streammerge.backends.fused.launcher.Residence`.

    Parameters
    ----------
    block
        The block; its buffer holds nothing.
    address
        The place from which the operands' offsets, and those of outputs, are counted.
    launcher
        Fetches operands for a method without a fused kernel.
    """

    def __init__(self, block: Block, address: int, launcher: Launcher) -> None:
        self._block, self._address, self._launcher = block, address, launcher

    def address(self, operand: Operand) -> int:
        """See `Residence`."""
        return self._address + operand.offset

    def output(self, out: Operand) -> int:
        """See `Residence`."""
        return self._address + out.offset

    def written(self, out: Operand) -> None:
        """See `Residence`; the engine copies it out."""

    def on_host(self) -> Block:
        """See `Residence`: in new memory, which no plan has counted; planned merges never come here."""
        block = self._block
        operands = [*([] if block.base is None else [block.base]), *block.models, *block.fishers]
        places, end = [], 0
        for operand in operands:
            places.append(Operand(end, operand.dtype))
            end += -(-operand_bytes(operand, block.n) // 8) * 8
        buffer = np.zeros(end, np.uint8)
        for operand, place in zip(operands, places, strict=True):
            part = buffer[place.offset : place.offset + operand_bytes(operand, block.n)]
            self._launcher.fetch(self.address(operand), part)
        first = int(block.base is not None)
        last = first + len(block.models)
        return replace(
            block,
            buffer=buffer,
            base=places[0] if first else None,
            models=tuple(places[first:last]),
            fishers=tuple(places[last:]),
        )
