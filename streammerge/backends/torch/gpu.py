"""CUDA streams that the workers share.

While one stream copies a chunk's operands to the GPU, a second merges and a third copies a result back. More streams
would only multiply the memory that torch keeps for each. The buffers are not pinned: it takes half a second a GiB, and
copies through the driver's own pinned memory are still faster than torch's operations.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_STREAMS = 3
_lock = threading.Lock()
_idle: dict[str, queue.SimpleQueue[Any]] = {}


def find_gpu(number: int) -> str | None:
    """Return the torch device of a GPU; None if torch does not find it."""
    import torch

    found = torch.cuda.is_available() and number < torch.cuda.device_count()
    return f"cuda:{number}" if found else None


@contextmanager
def turn_on(device: str) -> Iterator[None]:
    """Wait for an idle stream of a GPU, and make it this thread's current stream inside the context."""
    import torch

    with _lock:
        if device not in _idle:
            made = [torch.cuda.Stream(device) for _ in range(_STREAMS)]  # type: ignore[no-untyped-call]
            _idle[device] = (
                queue.SimpleQueue()
            )  # only now: what fails above must fail again, not wait for ever
            for stream in made:
                _idle[device].put(stream)
    stream = _idle[device].get()
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()  # since the next chunk reuses the buffer
        _idle[device].put(stream)


def share_of_memory(device: str) -> int:
    """Return the bytes of GPU memory that one stream may use: half of what is free or cached unused."""
    return free_memory(device) // 2 // _STREAMS


def free_memory(device: str) -> int:
    """Return the bytes of a GPU's memory that are free, or kept unused by torch."""
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + kept)


def synchronize(device: str) -> None:
    """Wait until the work that this thread gave to a GPU is done."""
    import torch

    torch.cuda.current_stream(device).synchronize()


def free_unused(device: str) -> None:
    """Return torch's cached memory to the GPU, so that any stream can use it."""
    import torch

    synchronize(device)
    torch.cuda.empty_cache()
