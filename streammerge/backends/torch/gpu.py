"""Pinned buffers for a GPU, and streams that the workers take turns on.

While one stream copies a chunk's operands in, a second merges and a third copies a result out. More streams than
these would only multiply the memory that torch keeps for each. A copy overlaps with anything only from pinned
memory.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from streammerge.errors import WorldError
from streammerge.io.buffer_pool import Bytes

_STREAMS = 3
_lock = threading.Lock()
_idle: dict[str, queue.SimpleQueue[Any]] = {}


def find_gpu(number: int) -> str | None:
    """Return the torch device of a GPU; None if torch finds no such GPU."""
    import torch

    found = torch.cuda.is_available() and number < torch.cuda.device_count()
    return f"cuda:{number}" if found else None


@contextmanager
def turn_on(device: str) -> Iterator[None]:
    """Wait for a stream of a GPU; the work that this thread gives the GPU goes to it until the block ends."""
    import torch

    with _lock:
        if device not in _idle:
            _idle[device] = queue.SimpleQueue()
            for _ in range(_STREAMS):
                _idle[device].put(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    stream = _idle[device].get()
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()  # the next chunk reuses the buffer
        _idle[device].put(stream)


def share_of_memory(device: str) -> int:
    """Return the bytes of a GPU's memory that one stream may fill: half of all that is free or kept unused."""
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + kept) // 2 // _STREAMS


def synchronize(device: str) -> None:
    """Wait until what this thread asked of a GPU is done."""
    import torch

    torch.cuda.current_stream(device).synchronize()


def free_unused(device: str) -> None:
    """Return the memory that torch keeps for later to the GPU, for any stream to use."""
    import torch

    synchronize(device)
    torch.cuda.empty_cache()


def pin(buffer: Bytes) -> None:
    """Lock a buffer's pages, so that copies from and to a GPU overlap with other work.

    Raises
    ------
    WorldError
        If the driver refuses.
    """
    import torch

    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = cudart.cudaHostRegister(buffer.ctypes.data, buffer.nbytes, 0)
    if int(error):
        raise WorldError(
            f"the GPU's driver cannot pin {buffer.nbytes} bytes of memory ({cudart.cudaGetErrorString(error)}); give "
            "less --memory, or merge with --device cpu"
        )


def unpin(buffer: Bytes) -> None:
    """Undo `pin`, before the buffer is given up."""
    import torch

    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    cudart.cudaHostUnregister(buffer.ctypes.data)
