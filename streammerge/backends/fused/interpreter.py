"""A launcher without a device: Triton's interpreter runs the kernels' sources by numpy, on this process's memory.

It is for tests of bits: it needs some milliseconds for each program. Triton reads `TRITON_INTERPRET` when it is imported,
so the interpreter has a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.backends.fused.launcher import KernelSpec

_ONE_AT_A_TIME = threading.Lock()
"""The interpreter patches its language, for all threads, while it runs a kernel."""


class _Kept:
    """Stands for patches of Triton's language that stay."""

    def restore(self) -> None:
        """Do nothing."""


def _patch_once() -> None:
    """Have Triton's language patched for the interpreter once and for good, and nothing computed for nothing.

    Triton patches its language anew in each call of one function by another, which takes half of the time of a kernel. It
    computes sums of 32-bit integers a second time, to complain in its debug mode only: a third of the rest. And it makes its
    table of dtypes anew for each operation, which takes a tenth.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter, "_patched"):
        return
    patch, interpreter._patched = interpreter._patch_lang, set()
    of_any = interpreter._get_np_dtype
    of_scalar = cache(of_any)
    interpreter._get_np_dtype = lambda dtype: (
        of_any(dtype) if isinstance(dtype.scalar, tl.pointer_type) else of_scalar(dtype.scalar)
    )

    def patch_new(function: Any) -> _Kept:
        known = [id(value) for value in function.__globals__.values() if value is tl or value is tl.core]
        if not interpreter._patched.issuperset(known):
            interpreter._patched.update(known)
            patch(function)
        return _Kept()

    interpreter._patch_lang = patch_new
    interpreter.interpreter_builder.options = replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )


class Interpreter:
    """Runs each kernel when it is launched.

    Parameters
    ----------
    kernels
        The catalog of kernels by name; default: that of the package.

    Raises
    ------
    RuntimeError
        If the variable `TRITON_INTERPRET` is not 1.
    """

    def __init__(self, kernels: Mapping[str, Any] | None = None) -> None:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("Triton compiles unless TRITON_INTERPRET=1 is set before it is imported")
        if kernels is None:
            from streammerge.backends.fused.sources.catalog import KERNELS

            kernels = KERNELS
        self._kernels = kernels
        with _ONE_AT_A_TIME:
            _patch_once()
        self._memory: dict[int, NDArray[np.uint8]] = {}

    def allocate(self, nbytes: int) -> int:
        """See `Launcher`."""
        memory = np.full(nbytes + 256, 0xA5, np.uint8)  # what is read before it is written shows
        address = -(-memory.ctypes.data // 256) * 256
        self._memory[address] = memory
        return address

    def free(self, address: int) -> None:
        """See `Launcher`."""
        del self._memory[address]

    def send(self, values: NDArray[Any], address: int) -> None:
        """See `Launcher`."""
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def clear(self, address: int, nbytes: int) -> None:
        """See `Launcher`."""
        ctypes.memset(address, 0, nbytes)

    def fetch(self, address: int, values: NDArray[Any]) -> None:
        """See `Launcher`."""
        ctypes.memmove(values.ctypes.data, address, values.nbytes)

    def launch(self, kernel: KernelSpec, grid: tuple[int, int], arguments: Sequence[int]) -> None:
        """See `Launcher`."""
        kernel.parameters(arguments)  # they fit
        known = self._kernels[kernel.name]
        with _ONE_AT_A_TIME, np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            known.function[grid](*arguments, **known.constants)
