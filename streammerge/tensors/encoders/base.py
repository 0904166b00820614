"""Encoders store a merged tensor as several tensors of a file: codes, and the scales that decode them.

An encoder is a value. From names and shapes alone it knows which tensors it writes, the position of each element's
bytes in them, and where a tensor may be cut. Each format is one file in this folder; the arithmetic is in
`streammerge.numerics.encoding`.

::

    merged, fp32   |-- unit --|-- unit --|-- unit --|-- u |     cut only between units
    codes          |----------|----------|----------|-----|     the same number of bytes per unit
    scales         |--|--|--|--|                                the same number of bytes per unit
    one number     |-|                                          written with the first element
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.quantized.declarations import Declaration
from streammerge.dtypes import BITS
from streammerge.formats.refs import SourceRef
from streammerge.io.buffer_pool import Bytes
from streammerge.records import dataclass

Span = tuple[int, int]
"""First byte and end, counted from the first byte of a stored tensor."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as stored in a file of the output."""

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


class Form(ABC):
    """The form in which one tensor is stored, as several tensors of a file; immutable and picklable."""

    __slots__ = ()

    @property
    @abstractmethod
    def label(self) -> str:
        """The name of the format, for display."""

    @property
    @abstractmethod
    def parts(self) -> tuple[Stored, ...]:
        """The tensors that it writes: the codes, then the tensors that decode them."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """Number of elements between two positions at which the tensor may be cut."""

    @property
    @abstractmethod
    def unit_nbytes(self) -> tuple[int, ...]:
        """Bytes of each part that belong to one unit; 0 for a part that belongs to the whole tensor."""

    @property
    def needs_peak(self) -> bool:
        """Whether encoding needs the largest magnitude of the whole tensor."""
        return False

    @property
    def scratch_bytes(self) -> int:
        """Upper bound of the bytes that encoding takes in addition to values and parts; small amounts are ignored."""
        return 0

    @property
    @abstractmethod
    def kernels(self) -> frozenset[str]:
        """Groups of compiled kernels that encoding uses."""

    def spans(self, start: int, stop: int) -> tuple[Span, ...]:
        """Return the span of bytes in each part that stores elements `start` to `stop`, which are whole units."""
        first, last = start // self.unit, -(-stop // self.unit)
        return tuple(
            (min(part.nbytes, first * per), min(part.nbytes, last * per))
            if per
            else (0, part.nbytes if start == 0 else 0)
            for part, per in zip(self.parts, self.unit_nbytes, strict=True)
        )

    def room(self, n: int) -> tuple[int, ...]:
        """Return the most bytes of each part that any `n` consecutive elements are stored in."""
        units = -(-n // self.unit)
        return tuple(
            min(part.nbytes, units * per) if per else part.nbytes
            for part, per in zip(self.parts, self.unit_nbytes, strict=True)
        )


class Encoder(Form):
    """Encodes the elements of one tensor as they are merged.

    `encode` may be called from many threads. It gets whole units, so that the bytes do not depend on the cuts.
    """

    __slots__ = ()

    @abstractmethod
    def encode(
        self, values: NDArray[np.float32], start: int, outs: Sequence[Bytes], peak: float | None
    ) -> None:
        """Encode finite elements from `start` on, in whole units, to the bytes of each part given by `spans`.

        Parameters
        ----------
        values
            The elements, of shape (n,).
        outs
            The bytes to write for each part, as many as its span has.
        peak
            The largest magnitude of the whole tensor, if `needs_peak`.
        """


# --- the registry: select the encoder that stores a tensor like a model's own tensor


class NotWrittenError(Exception):
    """A format can be read but not written; the message names the unsupported part."""


Named = Callable[[str], str]
"""Function that returns the name in the output for the name of a stored tensor in its model."""
Make = Callable[[Any, Named, Declaration], Encoder]
_MAKERS: dict[tuple[type[SourceRef], str | None], Make] = {}


def encodes(kind: type[SourceRef], element: str | None = None) -> Callable[[Make], Make]:
    """Register the function that returns the encoder of a kind of quantised tensor, or of one `element` of it."""

    def register(make: Make) -> Make:
        _MAKERS[kind, element] = make
        return make

    return register


def encoder_like(ref: SourceRef, named: Named, declared: Declaration) -> Encoder:
    """Return the encoder that stores a tensor in the format of `ref`.

    Raises
    ------
    NotWrittenError
        If there is no such encoder.
    """
    _load()
    element = getattr(getattr(ref, "encoding", None), "element", None)
    make = _MAKERS.get((type(ref), element))
    if make is None:
        raise NotWrittenError(ref.stored_format or "its format")
    return make(ref, named, declared)


@cache
def _load() -> None:
    """Import the modules of this folder, which register their formats."""
    package = __name__.rpartition(".")[0]
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{found.name}")
