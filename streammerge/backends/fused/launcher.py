"""The seam between the fused kernels and whatever runs them: memory of a device, and launches in order.

`FusedMath` knows no driver. It asks a `Launcher` for memory, sends tables of plain integers, and launches kernels by their
`KernelSpec`. Launchers: the CUDA driver with the shipped PTX, Triton's compiler at run time, and Triton's interpreter on
the host, for tests. Addresses are plain integers, so no launcher needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import Block, Operand
from streammerge.records import dataclass

_WIDTHS: dict[str, type[np.signedinteger[Any]]] = {"i32": np.int32, "i64": np.int64}


@dataclass(frozen=True)
class KernelSpec:
    """A compiled kernel: how it is found and launched."""

    name: str
    """Its name in the table of kernels."""
    file: str
    """Name of the file of PTX, within the package `streammerge.backends.fused.ptx`."""
    entry: str
    """Symbol of the function in the PTX."""
    signature: tuple[str, ...]
    """Types of the arguments, in order: ``i32`` or ``i64``. Addresses are ``i64``; there are no floating-point arguments."""
    nulls: int
    """Number of null pointers (64 bits) that follow the arguments in the PTX: scratch memory that no kernel of ours uses."""
    threads: int
    """Threads of a program (a CUDA block); the ``.reqntid`` of the PTX."""
    shared: int
    """Dynamic shared memory of a program in bytes."""
    elements: int
    """Elements, or units of the kernel's own, that one program processes: a grid has ceil(n / elements) programs."""

    def programs(self, n: int) -> int:
        """Return the number of programs along the first axis of a grid for `n` elements, at least 1."""
        return max(1, -(-n // self.elements))

    def parameters(self, arguments: Sequence[int]) -> list[np.signedinteger[Any]]:
        """Return the parameters of the PTX function as numbers of their own widths, the null pointers included.

        Raises
        ------
        ValueError
            If their number is not that of the signature.
        OverflowError
            If one does not fit its type.
        """
        typed = [_WIDTHS[kind](value) for kind, value in zip(self.signature, arguments, strict=True)]
        return [*typed, *(np.int64(0) for _ in range(self.nulls))]


class Launcher(Protocol):
    """One stream of a device: everything happens in the order of the calls, and only `fetch` waits.

    A launcher is used by one thread at a time.
    """

    def allocate(self, nbytes: int) -> int:
        """Return the address of new device memory, a multiple of 256; its contents are arbitrary.

        Raises
        ------
        MemoryError
            If the device has not that much; nothing has changed then.
        """

    def free(self, address: int) -> None:
        """Give memory back. Work that was enqueued before may still use it; what is enqueued later may reuse it."""

    def send(self, values: NDArray[Any], address: int) -> None:
        """Copy a contiguous array to the device. The array may change as soon as this returns."""

    def clear(self, address: int, nbytes: int) -> None:
        """Set bytes of the device to 0."""

    def fetch(self, address: int, values: NDArray[Any]) -> None:
        """Copy from the device into a contiguous array, and wait until all that was enqueued before is done."""

    def launch(self, kernel: KernelSpec, grid: tuple[int, int], arguments: Sequence[int]) -> None:
        """Enqueue a kernel with a grid of programs (first axis, second axis) and one integer for each of its arguments."""


class Residence(Protocol):
    """Where the operands of a block lie on the device, and where its outputs go."""

    def address(self, operand: Operand) -> int:
        """Return the device address of an input's first element; a multiple of its item size."""

    def output(self, out: Operand) -> int:
        """Return the device address that an output is written to; a multiple of its item size.

        Programs run in any order, so this place must not overlap an input of the block.
        """

    def written(self, out: Operand) -> None:
        """Take notice that the kernels which write an output are enqueued: copy it to where the block wants it."""

    def on_host(self) -> Block:
        """Return the block with its operands in this process's memory, for a method without a fused kernel."""
