"""What a GPU needs beside torch's formulas: pinned buffers, and a stream for each worker.

The workers' chunks are the ring: while one worker's operands are copied in, another's are merged, a third's
result is copied out, each on a stream of its own. A copy overlaps with anything only from pinned memory.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from streammerge.engine.memory import Bytes
from streammerge.errors import WorldError

_streams = threading.local()


def on_stream(device: str) -> AbstractContextManager[Any]:
    """Return a context in which this thread's work for a GPU goes to a stream of its own."""
    if device == "cpu":
        return nullcontext()
    import torch

    if not hasattr(_streams, "of"):
        _streams.of = {}
    if device not in _streams.of:
        _streams.of[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream: AbstractContextManager[Any] = torch.cuda.stream(_streams.of[device])
    return stream


def synchronize(device: str) -> None:
    """Wait until what this thread asked of a GPU is done."""
    if device != "cpu":
        import torch

        torch.cuda.current_stream(device).synchronize()


def free_unused(device: str) -> None:
    """Give a GPU's memory that torch keeps for later back to it, for any stream to use."""
    if device != "cpu":
        import torch

        synchronize(device)
        torch.cuda.empty_cache()


def pin(buffer: Bytes) -> None:
    """Lock a buffer's pages, so that copies from and to a GPU run beside other work.

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
