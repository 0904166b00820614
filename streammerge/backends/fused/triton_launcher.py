"""A launcher by Triton at run time, where Triton and a torch build for the GPU are installed: AMD, or any GPU without PTX.

The sources are compiled at their first launch (seconds, cached by Triton on the disk), without contraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.backends.fused.launcher import KernelSpec

OPTIONS = {"enable_fp_fusion": False}
"""Options of every kernel: a product is rounded before it is added."""


def can_compile() -> str | None:
    """Return why Triton cannot compile for a GPU here, or None if it can."""
    try:
        import torch
        import triton
    except ImportError as error:
        return f"{error.name} is not installed"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    backend = triton.runtime.driver.active.get_current_target().backend
    return None if backend in ("cuda", "hip") else f"Triton compiles for {backend}"


class TritonLauncher:
    """Launches the kernels' sources on a torch device, on the calling thread's current stream.

    Parameters
    ----------
    device
        ``cuda`` or ``cuda:N``; torch calls AMD's GPUs so too. ``cpu`` is for Triton's interpreter.
    """

    def __init__(self, device: str) -> None:
        from streammerge.backends.fused.sources.catalog import KERNELS

        self._kernels = KERNELS
        self._device = device
        self._memory: dict[int, Any] = {}

    def allocate(self, nbytes: int) -> int:
        """See `Launcher`."""
        import torch

        try:
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from None
        address: int = memory.data_ptr()
        self._memory[address] = memory
        return address

    def free(self, address: int) -> None:
        """See `Launcher`."""
        del self._memory[address]

    def send(self, values: NDArray[Any], address: int) -> None:
        """See `Launcher`."""
        import torch

        source = torch.from_numpy(values.reshape(-1).view(np.uint8))
        self._memory[address][: values.nbytes].copy_(source)

    def clear(self, address: int, nbytes: int) -> None:
        """See `Launcher`."""
        self._memory[address][:nbytes].zero_()

    def fetch(self, address: int, values: NDArray[Any]) -> None:
        """See `Launcher`."""
        import torch

        target = torch.from_numpy(values.reshape(-1).view(np.uint8))
        target.copy_(self._memory[address][: values.nbytes])

    def launch(self, kernel: KernelSpec, grid: tuple[int, int], arguments: Sequence[int]) -> None:
        """See `Launcher`."""
        import torch

        kernel.parameters(arguments)  # they fit
        known = self._kernels[kernel.name]
        on = nullcontext() if self._device == "cpu" else torch.cuda.device(self._device)
        with on:
            known.function[grid](*arguments, **known.constants, num_warps=known.warps, **OPTIONS)
