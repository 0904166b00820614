"""The contract of a backend: what computes blocks, and what the planner and the engine must know of it.

A backend is one value. It is registered in `streammerge.backends.registry`, and chosen in `streammerge.planning.backend`;
everything else asks the value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from streammerge.algebra.block import Block, BlockMath
from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import Rule
from streammerge.io.buffer_pool import Bytes


class TensorFacts(Protocol):
    """The facts about a merged tensor that bound a backend's temporaries."""

    @property
    def n_elements(self) -> int:
        """Number of elements."""

    @property
    def row_length(self) -> int:
        """Elements of one row."""

    @property
    def inputs(self) -> Sequence[object]:
        """The base, if there is one, and the models."""

    @property
    def fishers(self) -> Sequence[object]:
        """Fisher diagonals, one a model; empty where they are not used."""

    @property
    def operator_bytes(self) -> int:
        """Bytes of the regression operators of this tensor."""

    def line_length(self, sees: Extent) -> int:
        """Return the elements of one line of what the arithmetic must see at once."""


@dataclass(frozen=True)
class BufferHooks:
    """Calls around the life of a buffer: None where a backend takes any memory as it is."""

    prepare: Callable[[Bytes], None] | None = None
    """Called with each new buffer; raises WorldError if the device refuses it."""
    release: Callable[[Bytes], None] | None = None
    """Called before the buffer is unmapped."""


def _any_rule(rule: type[Rule]) -> bool:
    return True


@dataclass(frozen=True)
class Backend:
    """One way to compute blocks. All backends give the same bits."""

    name: str
    reserve: int
    """Bytes of resident memory that its libraries and threads take, the interpreter included."""
    workspace: Callable[[TensorFacts, int, Extent], int]
    """Returns an upper bound, in bytes, of temporaries in this process's memory for a block of so many elements."""
    math: Callable[[Block, str, Extent], BlockMath]
    """Returns what computes a block on a device, given how much the arithmetic must see at once."""
    turn: Callable[[str], AbstractContextManager[None]] | None = None
    """Waits for the device: a block is computed inside. None: threads never wait for each other."""
    buffers: BufferHooks = BufferHooks()
    device: str = "cpu"
    """The kind of device it runs on: ``cuda`` of ``cuda:0``."""
    find: Callable[[int], str | None] | None = None
    """Returns the device of a number, ``cuda:0``, or None if there is none. None: its devices have no numbers."""
    on_host: bool = True
    """Whether temporaries of formulas lie in this process's memory, not in the device's."""
    compiled: bool = False
    """Whether it runs compiled kernels, which must be compiled before their first use."""
    formulas: bool = True
    """Whether it computes plain formulas, Gram matrices and fp64; where it does not, `torch` does."""
    applies: Callable[[type[Rule]], bool] = _any_rule
    """Returns whether it applies rules of a class; where it does not, `torch` calls them."""
