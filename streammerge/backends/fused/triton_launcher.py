"""A launcher by Triton at run time, for AMD's GPUs, where Triton and a torch built for them are installed.

The sources are compiled at their first launch (seconds, cached by Triton on the disk), without contraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.backends.fused.launcher import KernelSpec
from streammerge.backends.fused.specs import kernel_specs

OPTIONS = {"enable_fp_fusion": False}
"""Options of every kernel: a product is rounded before it is added."""


@cache
def why_not_amd() -> str | None:
    """Return why Triton does not compile for an AMD GPU here, in a few words; None if it does. It is tried once."""
    try:
        import torch

        if not torch.version.hip:
            return "this is no torch for AMD"
        import triton  # noqa: F401

        launcher, spec = TritonLauncher("cuda"), kernel_specs()["square_sums"]
        address = launcher.allocate(64)
        launcher.clear(address, 64)
        launcher.launch(spec, (1, 1), [address, 2, 1, address + 8, address + 16])
        launcher.fetch(address, np.empty(8, np.int64))
    except Exception as error:  # no compiler, no driver, a version of Triton that knows other words
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


class TritonLauncher:
    """Launches the kernels' sources on a torch device, on the calling thread's current stream.

    Parameters
    ----------
    device
        ``cuda`` or ``cuda:N``; torch calls AMD's GPUs so too. ``cpu`` is for Triton's interpreter.
    """

    def __init__(self, device: str) -> None:
        from streammerge.backends.fused.sources.catalog import FOR_AMD

        self._kernels = FOR_AMD
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
        programs = (grid[0] * (kernel.elements // known.elements), grid[1])
        on = nullcontext() if self._device == "cpu" else torch.cuda.device(self._device)
        with on:
            known.function[programs](*arguments, **known.constants, num_warps=known.warps, **OPTIONS)
