"""The launcher of fused kernels over a driver: PTX that ships with the package, on one stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.backends.fused.launcher import KernelSpec
from streammerge.backends.gpu.arena import Space
from streammerge.backends.gpu.driver import Driver, Kernel, Stream
from streammerge.backends.gpu.ring import Ring


class DriverLauncher:
    """See `streammerge.backends.fused.launcher.Launcher`.

    Parameters
    ----------
    driver, stream
        The device and the stream of all its work.
    scratch
        The memory that it gives out. What is given back may be given out again at once, since the stream is in order.
    staging
        Slots through which small arrays pass, in both directions.
    ptx
        Returns the PTX of a kernel.
    """

    def __init__(
        self, driver: Driver, stream: Stream, scratch: Space, staging: Ring, ptx: Callable[[KernelSpec], str]
    ) -> None:
        self._driver, self._stream = driver, stream
        self._scratch, self._staging, self._ptx = scratch, staging, ptx
        self._kernels: dict[str, Kernel] = {}
        self._never = threading.Event()

    def allocate(self, nbytes: int) -> int:
        """See `Launcher`."""
        return self._scratch.allocate(nbytes)

    def free(self, address: int) -> None:
        """See `Launcher`."""
        self._scratch.free(address)

    def send(self, values: NDArray[Any], address: int) -> None:
        """See `Launcher`."""
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        for start in range(0, data.size, self._staging.slot_bytes):
            part = data[start : start + self._staging.slot_bytes]
            number, slot = self._slot()
            event = None
            try:
                slot[: part.size] = part
                self._driver.copy_in(slot[: part.size], address + start, self._stream)
                event = self._driver.record(self._stream)
            finally:
                self._staging.give(number, event)

    def clear(self, address: int, nbytes: int) -> None:
        """See `Launcher`."""
        self._driver.clear(address, nbytes, self._stream)

    def fetch(self, address: int, values: NDArray[Any]) -> None:
        """See `Launcher`."""
        data = values.reshape(-1).view(np.uint8)
        for start in range(0, data.size, self._staging.slot_bytes):
            part = data[start : start + self._staging.slot_bytes]
            number, slot = self._slot()
            try:
                self._driver.copy_out(address + start, slot[: part.size], self._stream)
                self._driver.synchronize(self._driver.record(self._stream))
                part[:] = slot[: part.size]
            finally:
                self._staging.give(number)

    def launch(self, kernel: KernelSpec, grid: tuple[int, int], arguments: Sequence[int]) -> None:
        """See `Launcher`."""
        if kernel.name not in self._kernels:
            self._kernels[kernel.name] = self._driver.load(self._ptx(kernel), kernel.entry)
        self._driver.launch(
            self._kernels[kernel.name],
            grid,
            kernel.threads,
            kernel.shared,
            kernel.parameters(arguments),
            self._stream,
        )

    def _slot(self) -> tuple[int, NDArray[np.uint8]]:
        taken = self._staging.take(self._never)
        assert taken is not None
        return taken
