"""The contract of a GPU's driver: memory, copies, events and launches, with addresses as plain integers.

::

    CoreDriver    cuda-core and cuda-bindings (extra `gpu`): no torch is needed
    TorchDriver   torch's CUDA build, whose loader of PTX is private

Tests register a third, which executes copies in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from streammerge.errors import WorldError
from streammerge.io.buffer_pool import Bytes

Stream = Any
"""A queue of work on the device, in order; what the driver made."""
Event = Any
"""A point in a stream."""
Kernel = Any
"""A loaded kernel."""


class DriverError(WorldError):
    """A call of the driver failed; finished work is kept."""

    def __init__(self, call: str, why: object) -> None:
        self.why = why
        super().__init__(
            f"the GPU's driver failed at {call} ({why}): finished work is kept; run the same command again, or with "
            "--device cpu"
        )


@contextmanager
def told(what: str) -> Iterator[None]:
    """Turn the exceptions of a library into ours."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise DriverError(what, text or type(error).__name__) from error


class Driver(Protocol):
    """One GPU, used from many threads. Every method raises `DriverError` if the driver refuses.

    Copies and launches are enqueued and return at once; `synchronize` alone waits.
    """

    def memory(self) -> int:
        """Return the free bytes of the device."""

    def allocate(self, nbytes: int) -> int:
        """Return the address of new device memory, a multiple of 256.

        Raises
        ------
        MemoryError
            If the device has not that much.
        """

    def free(self, address: int) -> None:
        """Give memory back that no enqueued work uses."""

    def pin(self, buffer: Bytes) -> None:
        """Lock a buffer's pages, so that copies from and to it overlap with other work."""

    def unpin(self, buffer: Bytes) -> None:
        """Undo `pin`."""

    def stream(self) -> Stream:
        """Return a new stream."""

    def copy_in(self, source: Bytes, address: int, stream: Stream) -> None:
        """Enqueue a copy to the device; `source` must stay as it is until it is done."""

    def copy_out(self, address: int, target: Bytes, stream: Stream) -> None:
        """Enqueue a copy from the device; `target` holds it once it is done."""

    def clear(self, address: int, nbytes: int, stream: Stream) -> None:
        """Enqueue the setting of bytes to 0."""

    def record(self, stream: Stream) -> Event:
        """Return an event that happens when all work enqueued so far is done."""

    def wait(self, stream: Stream, event: Event) -> None:
        """Let what is enqueued from now on begin after an event of a different stream."""

    def synchronize(self, event: Event) -> None:
        """Wait until an event has happened."""

    def load(self, ptx: str, entry: str) -> Kernel:
        """Return a kernel of a text of PTX, which the driver compiles unless it has done so before."""

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        parameters: Sequence[Any],
        stream: Stream,
    ) -> None:
        """Enqueue a kernel: `grid` blocks of `threads` threads, with numpy scalars as `parameters`."""

    def close(self) -> None:
        """Give everything back."""
