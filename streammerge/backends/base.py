"""The contract of a backend: its computation of blocks, and the facts that the planner and the engine need about it.

A backend is one value. `streammerge.backends.registry` registers it, `streammerge.planning.backend` chooses it, and all
other code asks the value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from streammerge.algebra.block import Block, BlockMath, Call
from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import Rule
from streammerge.backends.gpu.lane import Lane
from streammerge.io.buffer_pool import Bytes
from streammerge.records import dataclass


class TensorFacts(Protocol):
    """The facts about a merged tensor that bound a backend's temporaries."""

    @property
    def n_elements(self) -> int:
        """Number of elements."""

    @property
    def row_length(self) -> int:
        """Number of elements per row."""

    @property
    def inputs(self) -> Sequence[object]:
        """The base, if any, and the models."""

    @property
    def fishers(self) -> Sequence[object]:
        """The Fisher diagonals, one per model; empty if they are not used."""

    @property
    def operator_bytes(self) -> int:
        """Size of the regression operators of this tensor in bytes."""

    def line_length(self, sees: Extent) -> int:
        """Return the number of elements of one line (row, or slice along the first axis) for an extent."""


@dataclass(frozen=True)
class BufferHooks:
    """Hooks around the life of a buffer, for backends that need prepared memory."""

    prepare: Callable[[Bytes], None] | None = None
    """Called with each new buffer; raises WorldError if the device refuses it."""
    release: Callable[[Bytes], None] | None = None
    """Called before the buffer is unmapped."""


def _any_rule(rule: type[Rule]) -> bool:
    return True


def _lacks_nothing() -> None:
    return None


def _fuses_nothing(rule: Rule, calls: Sequence[Call]) -> bool:
    return False


@dataclass(frozen=True)
class Backend:
    """A way to compute blocks. All backends return the same bits."""

    name: str
    reserve: int
    """Resident memory of its libraries and threads in bytes, the interpreter included."""
    workspace: Callable[[TensorFacts, int, Extent], int]
    """Function that returns an upper bound, in bytes, of the temporaries in this process's memory for a block."""
    math: Callable[[Block, str, Extent], BlockMath]
    """Function that returns the `BlockMath` of a block on a device, given the extent of the arithmetic."""
    turn: Callable[[str], AbstractContextManager[None]] | None = None
    """Context manager in which a block is computed; it waits for the device. None: threads never wait."""
    buffers: BufferHooks = BufferHooks()
    device: str = "cpu"
    """The kind of device it runs on: ``cuda`` of ``cuda:0``."""
    find: Callable[[int], str | None] | None = None
    """Function that returns the device of a number (``cuda:0``), or None if it does not exist. None: no numbers."""
    on_host: bool = True
    """Whether temporaries of formulas are in this process's memory; False: in the device's."""
    room: Callable[[str], int] | None = None
    """Function that returns the bytes of a device's memory that are free. None: temporaries are in this process's memory."""
    compiled: bool = False
    """Whether it runs kernels that must be compiled before their first use."""
    settles: bool = False
    """True if its arithmetic is `SettlingMath`, which merges while thresholds are counted."""
    formulas: bool = True
    """Whether it computes plain formulas, Gram matrices and fp64; if not, the backend `torch` does."""
    applies: Callable[[type[Rule]], bool] = _any_rule
    """Function that returns whether it applies rules of a class; if not, the backend `torch` calls the rule."""
    open_lane: Callable[[str], Lane] | None = None
    """Function that opens the device of a name for whole tensors; None: blocks are computed from this process's memory."""
    fuses: Callable[[Rule, Sequence[Call]], bool] = _fuses_nothing
    """Function that returns whether a tensor with this rule, and these calls of its statistics, is merged on the device."""
    rest: Backend | None = None
    """The backend of what it does not compute, and in its place where it `lacks` something; None: `torch`, on the CPU."""
    lacks: Callable[[], str | None] = _lacks_nothing
    """Function that returns what is missing here for it to run; None: nothing."""
    rate: float = 0.0
    """GB of inputs per second that it merges by a method of several passes; 0: the CPUs' own rate counts."""
