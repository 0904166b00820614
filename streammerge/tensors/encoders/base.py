"""What stores a merged tensor in a form of its own: codes, and the scales that decode them, as several tensors of a file.

An encoder is a value: it knows from names and shapes alone which tensors it makes, where in them each element has its
bytes, and where a tensor may be cut. One format is one file in this folder. Its arithmetic is in
`streammerge.numerics.encoding`.

::

    merged, fp32   |-- unit --|-- unit --|-- unit --|-- u |     cut only between units
    codes          |----------|----------|----------|-----|     of each unit as many bytes
    scales         |--|--|--|--|                                of each unit as many bytes
    one number     |-|                                          written with the first element
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.quantized.declarations import Declaration
from streammerge.dtypes import BITS
from streammerge.formats.refs import SourceRef
from streammerge.io.buffer_pool import Bytes

Span = tuple[int, int]
"""First byte and end, counted from the first byte of a stored tensor."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as a file of the output holds it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        n = BITS[self.dtype]
        for size in self.shape:
            n *= size
        return n // 8


class Encoder(ABC):
    """Stores the elements of one tensor; immutable, and it pickles.

    `encode` may be called from many threads, and is given whole units, so that the bytes do not depend on the cuts.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def label(self) -> str:
        """What the format is called, for people."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Stored, ...]:
        """The tensors that it makes: the codes, then what decodes them."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """Elements between two places where the tensor may be cut."""

    @property
    @abstractmethod
    def unit_nbytes(self) -> tuple[int, ...]:
        """Bytes of each part that belong to one unit; 0: the part belongs to the tensor as a whole."""

    @property
    def needs_peak(self) -> bool:
        """Whether the largest magnitude of the whole tensor must be known before its first element is encoded."""
        return False

    @property
    def scratch_bytes(self) -> int:
        """Upper bound of the bytes that encoding takes in addition to values and parts, if they are many."""
        return 0

    @property
    @abstractmethod
    def kernels(self) -> frozenset[str]:
        """Groups of compiled kernels that encoding makes use of."""

    @abstractmethod
    def encode(
        self, values: NDArray[np.float32], start: int, outs: Sequence[Bytes], peak: float | None
    ) -> None:
        """Encode finite elements from `start` on, in whole units, to the bytes of each part that `spans` names.

        Parameters
        ----------
        values
            Shape (n,).
        outs
            Of each part, as many bytes as its span has.
        peak
            The largest magnitude of the whole tensor where `needs_peak`.
        """

    def spans(self, start: int, stop: int) -> tuple[Span, ...]:
        """Return the bytes of each part that elements `start` to `stop`, whole units, are stored in."""
        first, last = start // self.unit, -(-stop // self.unit)
        return tuple(
            (min(part.nbytes, first * per), min(part.nbytes, last * per))
            if per
            else (0, part.nbytes if start == 0 else 0)
            for part, per in zip(self.parts, self.unit_nbytes, strict=True)
        )

    def room(self, n: int) -> tuple[int, ...]:
        """Return the most bytes of each part that `n` elements, cut out anywhere, are stored in."""
        units = -(-n // self.unit)
        return tuple(
            min(part.nbytes, units * per) if per else part.nbytes
            for part, per in zip(self.parts, self.unit_nbytes, strict=True)
        )


# --- the registry: which encoder stores a tensor as a model's own is stored


class NotWrittenError(Exception):
    """A format is read and not written; the message names what of it is not."""


Named = Callable[[str], str]
"""Returns the name in the output of what a stored tensor is called in its model."""
Make = Callable[[Any, Named, Declaration], Encoder]
_MAKERS: dict[tuple[type[SourceRef], str | None], Make] = {}


def encodes(kind: type[SourceRef], element: str | None = None) -> Callable[[Make], Make]:
    """Register what returns the encoder of a kind of quantised tensors, where it has several of one kind of elements."""

    def register(make: Make) -> Make:
        _MAKERS[kind, element] = make
        return make

    return register


def encoder_like(ref: SourceRef, named: Named, declared: Declaration) -> Encoder:
    """Return what stores a tensor as `ref` is stored.

    Raises
    ------
    NotWrittenError
        If nothing does.
    """
    _load()
    element = getattr(getattr(ref, "encoding", None), "element", None)
    make = _MAKERS.get((type(ref), element))
    if make is None:
        raise NotWrittenError(ref.stored_format or "its format")
    return make(ref, named, declared)


@cache
def _load() -> None:
    """Import the formats of this folder, which register themselves."""
    package = __name__.rpartition(".")[0]
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{found.name}")
