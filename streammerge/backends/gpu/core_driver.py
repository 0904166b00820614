"""The driver by NVIDIA's cuda-core (streams, events, modules, launches) and cuda-bindings (copies, memory)."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from typing import Any

from streammerge.backends.gpu.driver import DriverError, Event, Kernel, Stream, told
from streammerge.errors import InputError
from streammerge.io.buffer_pool import Bytes

_OUT_OF_MEMORY = 2
"""CUDA_ERROR_OUT_OF_MEMORY."""
_NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE."""
_CURES = {
    802: "start nvidia-fabricmanager, or ",
    803: "restart the machine, since its driver was updated, or ",
}
"""Cures of CUDA_ERROR_SYSTEM_NOT_READY, of GPUs that NVSwitch joins, and of CUDA_ERROR_SYSTEM_DRIVER_MISMATCH."""
_TEXT = 256
"""Bytes of a name that the driver gives."""
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and MINOR."""


def is_installed() -> bool:
    """Return whether cuda-core and cuda-bindings are installed; nothing is imported."""
    try:
        return all(
            importlib.util.find_spec(name) is not None for name in ("cuda.core", "cuda.bindings.driver")
        )
    except (ImportError, ValueError):
        return False


def count_gpus() -> int:
    """Return the number of GPUs that the driver finds; 0 without a driver.

    Raises
    ------
    InputError
        If there is a driver that does not start, or that is older than cuda-bindings.
    """
    from cuda.bindings import driver

    try:
        (error,) = driver.cuInit(0)
        if not int(error):
            error, count = driver.cuDeviceGetCount()
    except (RuntimeError, OSError):  # no libcuda
        return 0
    number = int(error)
    if number == _NO_DEVICE:
        return 0
    if number:
        name, cure = getattr(error, "name", number), _CURES.get(number, "")
        raise InputError(f"the GPU's driver does not start ({name}): {cure}use --device cpu")
    (version,) = _checked("cuDriverGetVersion", driver.cuDriverGetVersion())
    _check_version(int(version), int(driver.CUDA_VERSION))
    return int(count)


def _check_version(version: int, bindings: int) -> None:
    """Refuse a driver of an older CUDA than the bindings, whose calls may then fail, or do something else.

    Versions are 1000 times the major one and 10 times the minor one; minor ones may differ.
    """
    major = bindings // 1000
    if version // 1000 < major:
        raise InputError(
            f"cuda-bindings is for CUDA {major}, and the GPU's driver for CUDA {version // 1000}.{version % 1000 // 10}: "
            f"pip install 'cuda-bindings<{major}', or use --device cpu"
        )


def capability(number: int) -> tuple[int, int]:
    """Return the compute capability of a GPU that `count_gpus` counts; no context is made.

    Raises
    ------
    DriverError
        If the driver does not say.
    """
    from cuda.bindings import driver

    (device,) = _checked("cuDeviceGet", driver.cuDeviceGet(number))
    major, minor = (
        _checked("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(_attribute(driver, which), device))[0]
        for which in (_MAJOR, _MINOR)
    )
    return int(major), int(minor)


def title(number: int) -> str:
    """Return the name of a GPU and its bus ID, which ``nvidia-smi`` shows whatever the order of the numbers is.

    Raises
    ------
    DriverError
        If the driver does not say.
    """
    from cuda.bindings import driver

    (device,) = _checked("cuDeviceGet", driver.cuDeviceGet(number))
    texts = (
        _checked("cuDeviceGetName", driver.cuDeviceGetName(_TEXT, device)),
        _checked("cuDeviceGetPCIBusId", driver.cuDeviceGetPCIBusId(_TEXT, device)),
    )
    name, bus = (text.partition(b"\0")[0].decode(errors="replace") for (text,) in texts)
    return f"{name}, bus ID {bus}"


def _attribute(driver: Any, number: int) -> Any:
    return driver.CUdevice_attribute(number)


class CoreDriver:
    """See `Driver`. The device's primary context, which torch shares.

    Parameters
    ----------
    number
        The number of the GPU among those that ``CUDA_VISIBLE_DEVICES`` shows.
    """

    def __init__(self, number: int) -> None:
        from cuda import core
        from cuda.bindings import driver

        self._core, self._driver = core, driver
        self._contexts = threading.local()
        with told("its start"):
            self._device = core.Device(number)
        self._modules: dict[int, Any] = {}

    def _here(self) -> Any:
        """Return the bindings, with the device's context current in this thread.

        It is made current in every call: torch leaves the context of its own device current when it has used a GPU.
        """
        context = getattr(self._contexts, "of_device", None)
        if context is None:
            with told("a new thread"):
                self._device.set_current()
            (self._contexts.of_device,) = _checked("cuCtxGetCurrent", self._driver.cuCtxGetCurrent())
        else:
            _checked("cuCtxSetCurrent", self._driver.cuCtxSetCurrent(context))
        return self._driver

    def memory(self) -> int:
        """See `Driver`."""
        return int(_checked("cuMemGetInfo", self._here().cuMemGetInfo())[0])

    def allocate(self, nbytes: int) -> int:
        """See `Driver`."""
        result = self._here().cuMemAlloc(nbytes)
        if int(result[0]) == _OUT_OF_MEMORY:
            raise MemoryError
        return int(_checked("cuMemAlloc", result)[0])

    def free(self, address: int) -> None:
        """See `Driver`."""
        _checked("cuMemFree", self._here().cuMemFree(address))

    def pin(self, buffer: Bytes) -> None:
        """See `Driver`."""
        _checked("cuMemHostRegister", self._here().cuMemHostRegister(buffer.ctypes.data, buffer.nbytes, 0))

    def unpin(self, buffer: Bytes) -> None:
        """See `Driver`."""
        _checked("cuMemHostUnregister", self._here().cuMemHostUnregister(buffer.ctypes.data))

    def stream(self) -> Stream:
        """See `Driver`."""
        self._here()
        with told("a stream"):
            return self._device.create_stream()

    def copy_in(self, source: Bytes, address: int, stream: Stream) -> None:
        """See `Driver`."""
        call = self._here().cuMemcpyHtoDAsync
        _checked("cuMemcpyHtoDAsync", call(address, source.ctypes.data, source.nbytes, stream.handle))

    def copy_out(self, address: int, target: Bytes, stream: Stream) -> None:
        """See `Driver`."""
        call = self._here().cuMemcpyDtoHAsync
        _checked("cuMemcpyDtoHAsync", call(target.ctypes.data, address, target.nbytes, stream.handle))

    def clear(self, address: int, nbytes: int, stream: Stream) -> None:
        """See `Driver`."""
        _checked("cuMemsetD8Async", self._here().cuMemsetD8Async(address, 0, nbytes, stream.handle))

    def record(self, stream: Stream) -> Event:
        """See `Driver`."""
        self._here()
        with told("an event"):
            return stream.record(options={"blocking_sync": True})

    def wait(self, stream: Stream, event: Event) -> None:
        """See `Driver`."""
        self._here()
        with told("a wait for an event"):
            stream.wait(event)

    def synchronize(self, event: Event) -> None:
        """See `Driver`."""
        self._here()
        with told("the end of its work"):
            event.sync()

    def load(self, ptx: str, entry: str) -> Kernel:
        """See `Driver`."""
        self._here()
        with told(f"loading the kernel {entry}"):
            key = hash(ptx)
            if key not in self._modules:
                self._modules[key] = self._core.ObjectCode.from_ptx(ptx.encode())
            return self._modules[key].get_kernel(entry)

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        parameters: Sequence[Any],
        stream: Stream,
    ) -> None:
        """See `Driver`."""
        self._here()
        with told("a launch"):
            config = self._core.LaunchConfig(grid=grid, block=threads, shmem_size=shared)
            self._core.launch(stream, config, kernel, *parameters)

    def close(self) -> None:
        """See `Driver`; the primary context stays, for torch may use it."""
        self._modules.clear()


def _checked(call: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the values of a call of the bindings."""
    error, *values = result
    if int(error):
        raise DriverError(call, getattr(error, "name", error))
    return tuple(values)
