"""The simplest residence: operands are copied to the device when they are first used, outputs back when they are written."""

from __future__ import annotations

import weakref
from typing import Any

from numpy.typing import NDArray

from streammerge.algebra.block import Block, Operand, operand_bytes
from streammerge.backends.fused.launcher import Launcher
from streammerge.backends.fused.memory import Scratch


class Copied:
    """A block whose buffer is in this process's memory.

    Parameters
    ----------
    block
        The block; outputs are written to its buffer.
    launcher
        The stream of the device; its memory is given back with this object.
    """

    def __init__(self, block: Block, launcher: Launcher) -> None:
        self._block = block
        self._launcher = launcher
        self._scratch = Scratch(launcher)
        self._inputs: dict[Operand, int] = {}
        self._outputs: dict[Operand, int] = {}
        weakref.finalize(self, self._scratch.free)

    def address(self, operand: Operand) -> int:
        """See `Residence`."""
        if operand not in self._inputs:
            self._inputs[operand] = self._scratch.sent(self._bytes(operand))
        return self._inputs[operand]

    def output(self, out: Operand) -> int:
        """See `Residence`."""
        self._outputs[out] = self._scratch.empty(operand_bytes(out, self._block.n))
        return self._outputs[out]

    def written(self, out: Operand) -> None:
        """Copy an output into the block's buffer, and wait; it may overlay an input, which is not read again."""
        self._launcher.fetch(self._outputs[out], self._bytes(out))

    def on_host(self) -> Block:
        """See `Residence`."""
        return self._block

    def _bytes(self, operand: Operand) -> NDArray[Any]:
        return self._block.buffer[operand.offset : operand.offset + operand_bytes(operand, self._block.n)]
