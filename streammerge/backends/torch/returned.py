"""Give the memory of large matrices back to the system, which malloc and BLAS would keep for later."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 20
"""Size in bytes from which an allocation is a mapping of its own. The default of glibc grows to 32 MiB by itself."""


def return_freed_matrices() -> None:
    """Have malloc return freed blocks of 1 MiB and more to the system from now on, in this process."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # a C library other than glibc may lack it
    if set_option is not None:
        set_option(_M_MMAP_THRESHOLD, _LARGE)


def free_packed() -> None:
    """Free the memory in which BLAS packs operands in this thread; MKL keeps some 20 MiB per thread."""
    if (free := _mkl_free()) is not None:
        free()


@cache
def _mkl_free() -> Callable[[], Any] | None:
    import torch

    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        found: Callable[[], Any] = ctypes.CDLL(str(library)).mkl_serv_thread_free_buffers
    except (OSError, AttributeError):
        return None  # a build without MKL
    return found
