"""The driver by torch's CUDA build, whose loader of PTX is private: used where cuda-core is missing."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from streammerge.backends.gpu.driver import DriverError, Event, Kernel, Stream, told
from streammerge.io.buffer_pool import Bytes


def is_usable() -> bool:
    """Return whether torch is a CUDA build that has the loader; it is imported for that."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    if not torch.version.cuda:
        return False
    from torch.cuda import _utils

    return hasattr(_utils, "_cuda_load_module") and hasattr(_utils, "_get_gpu_runtime_library")


def capability(number: int) -> tuple[int, int]:
    """Return the compute capability of a GPU that torch counts."""
    import torch

    major, minor = torch.cuda.get_device_capability(number)
    return major, minor


def title(number: int) -> str:
    """Return the name of a GPU and, where torch knows it, the bus ID that ``nvidia-smi`` shows."""
    import torch

    facts: Any = torch.cuda.get_device_properties(number)
    if not hasattr(facts, "pci_bus_id"):  # of older versions
        return str(facts.name)
    place = f"{facts.pci_domain_id:04X}:{facts.pci_bus_id:02X}:{facts.pci_device_id:02X}.0"
    return f"{facts.name}, bus ID {place}"


class TorchDriver:
    """See `Driver`.

    Parameters
    ----------
    number
        The number of the GPU among those that torch counts.
    """

    def __init__(self, number: int) -> None:
        import torch
        from torch.cuda import _utils

        self._torch = torch
        self._utils: Any = _utils
        self._cuda_types: Any = torch.cuda
        self._device = torch.device("cuda", number)
        with told("its start"):
            torch.zeros(1, device=self._device)
            self._cuda: Any = _utils._get_gpu_runtime_library()
            self._runtime: Any = self._cuda_types.cudart()
        self._held: dict[int, Any] = {}

    def memory(self) -> int:
        """See `Driver`."""
        with told("cuMemGetInfo"):
            return int(self._torch.cuda.mem_get_info(self._device)[0])

    def allocate(self, nbytes: int) -> int:
        """See `Driver`."""
        try:
            held = self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._device)
        except self._torch.OutOfMemoryError:
            raise MemoryError from None
        self._held[held.data_ptr()] = held
        return int(held.data_ptr())

    def free(self, address: int) -> None:
        """See `Driver`."""
        del self._held[address]

    def pin(self, buffer: Bytes) -> None:
        """See `Driver`; without the guard a context of the first GPU would be made for it."""
        with self._torch.cuda.device(self._device):
            error = int(self._runtime.cudaHostRegister(buffer.ctypes.data, buffer.nbytes, 0))
        if error:
            raise DriverError("cudaHostRegister", error)

    def unpin(self, buffer: Bytes) -> None:
        """See `Driver`."""
        with self._torch.cuda.device(self._device):
            error = int(self._runtime.cudaHostUnregister(buffer.ctypes.data))
        if error:
            raise DriverError("cudaHostUnregister", error)

    def stream(self) -> Stream:
        """See `Driver`."""
        with told("a stream"):
            return self._cuda_types.Stream(self._device)

    def copy_in(self, source: Bytes, address: int, stream: Stream) -> None:
        """See `Driver`."""
        self._call("cuMemcpyHtoDAsync_v2", _u64(address), _pointer(source), _size(source.nbytes), _of(stream))

    def copy_out(self, address: int, target: Bytes, stream: Stream) -> None:
        """See `Driver`."""
        self._call("cuMemcpyDtoHAsync_v2", _pointer(target), _u64(address), _size(target.nbytes), _of(stream))

    def clear(self, address: int, nbytes: int, stream: Stream) -> None:
        """See `Driver`."""
        self._call("cuMemsetD8Async", _u64(address), ctypes.c_ubyte(0), _size(nbytes), _of(stream))

    def record(self, stream: Stream) -> Event:
        """See `Driver`."""
        with told("an event"), self._torch.cuda.device(self._device):
            event = self._cuda_types.Event(blocking=True)
            event.record(stream)
            return event

    def wait(self, stream: Stream, event: Event) -> None:
        """See `Driver`."""
        with told("a wait for an event"):
            stream.wait_event(event)

    def synchronize(self, event: Event) -> None:
        """See `Driver`."""
        with told("the end of its work"):
            event.synchronize()

    def load(self, ptx: str, entry: str) -> Kernel:
        """See `Driver`."""
        with told(f"loading the kernel {entry}"), self._torch.cuda.device(self._device):
            return self._utils._cuda_load_module(ptx, [entry])[entry]

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        parameters: Sequence[Any],
        stream: Stream,
    ) -> None:
        """See `Driver`: torch's own launch takes integers of 32 bits only."""
        held = [np.array(value) for value in parameters]
        places = (ctypes.c_void_p * len(held))(*(one.ctypes.data for one in held))
        sizes = (ctypes.c_uint(one) for one in (*grid, 1, threads, 1, 1, shared))
        self._call("cuLaunchKernel", kernel.func, *sizes, _of(stream), places, None)

    def _call(self, name: str, *arguments: Any) -> None:
        with self._torch.cuda.device(self._device):
            error = int(getattr(self._cuda, name)(*arguments))
        if error:
            raise DriverError(name, f"error {error}")

    def close(self) -> None:
        """See `Driver`."""
        self._held.clear()


_u64, _size = ctypes.c_uint64, ctypes.c_size_t


def _pointer(data: Bytes) -> Any:
    return ctypes.c_void_p(data.ctypes.data)


def _of(stream: Stream) -> Any:
    return ctypes.c_void_p(stream.cuda_stream)
