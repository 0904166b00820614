"""Operands on the device, scratch memory, and launches by name: the fused methods of a block share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Block, Counts, Operand
from streammerge.algebra.task_vectors import TaskVector
from streammerge.backends.fused.launcher import Launcher, Residence
from streammerge.backends.fused.specs import kernel_specs
from streammerge.backends.fused.tables import CODES, NOTHING, Table, vector_rows

LEAD = 3
"""Elements by which the first program may begin before the block, since random words come in groups of four."""


class Scratch:
    """Device memory for one call, given back at its end."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._held: list[int] = []

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.free()

    def free(self) -> None:
        """Give all of it back."""
        while self._held:
            self._launcher.free(self._held.pop())

    def empty(self, nbytes: int) -> int:
        """Return the address of new memory."""
        self._held.append(self._launcher.allocate(max(8, nbytes)))
        return self._held[-1]

    def zeros(self, nbytes: int) -> int:
        """Return the address of new memory that holds zeros."""
        address = self.empty(nbytes)
        self._launcher.clear(address, max(8, nbytes))
        return address

    def sent(self, values: NDArray[Any]) -> int:
        """Return the address of a copy of an array."""
        address = self.empty(values.nbytes)
        self._launcher.send(np.ascontiguousarray(values), address)
        return address


class DeviceMemory:
    """A block on a device.

    Parameters
    ----------
    block
        The same elements of every model; its buffer is not read.
    launcher
        The stream of the device.
    residence
        Where the operands lie.
    """

    def __init__(self, block: Block, launcher: Launcher, residence: Residence) -> None:
        self.block = block
        self.launcher = launcher
        self.residence = residence

    def scratch(self) -> Scratch:
        """Return memory for one call."""
        return Scratch(self.launcher)

    def launch(self, name: str, grid: tuple[int, int], *arguments: int) -> None:
        """Enqueue a kernel with a grid of programs."""
        self.launcher.launch(kernel_specs()[name], grid, arguments)

    def over_elements(self, name: str, *arguments: int, second: int = 1) -> None:
        """Enqueue a kernel with as many programs as the elements of the block need."""
        self.launch(name, (kernel_specs()[name].programs(self.block.n + LEAD), second), *arguments)

    def fetch(self, address: int, n: int) -> Counts:
        """Wait, and return counters, (n,)."""
        counts = np.empty(n, np.int64)
        self.launcher.fetch(address, counts)
        return counts

    def fetch_reals(self, address: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Wait, and return fp64 numbers."""
        values = np.empty(shape, np.float64)
        self.launcher.fetch(address, values)
        return values

    # --- operands

    def place(self, operand: Operand | None) -> tuple[int, int]:
        """Return the address and the code of an input; None holds zeros."""
        return (0, NOTHING) if operand is None else (self.residence.address(operand), CODES[operand.dtype])

    def base(self) -> tuple[int, int, int, int]:
        """Return the address and code of the base, the flat index of the block's first element, and their number."""
        return (*self.place(self.block.base), self.block.start, self.block.n)

    def rows(self, vectors: Sequence[TaskVector], *, cut: bool = True) -> Table:
        """Return the table of task vectors; with ``cut=False`` only the drops remove entries."""
        addresses = [self.residence.address(self.block.models[v.model]) for v in vectors]
        return vector_rows(self.block, vectors, addresses, cut=cut)
