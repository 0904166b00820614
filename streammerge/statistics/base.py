"""The contract of a statistic: an exact number (or several) computed from tensors before they are merged.

A statistic is one class in one file: its fields say what to compute, and its methods give the cost, the conversion of
the value to and from JSON, and the reducer. The planner, the engine and the backends know only this contract, so a new
kind of statistic is a new file. A method asks with ``value = yield from ask(TopK(...))``. The engine decides how the
value is computed (in memory, streamed, by several processes, over a tensor or the whole model); the value is the same.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import field
from enum import Enum
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import BlockMath, Call
from streammerge.algebra.extent import Extent
from streammerge.numerics.philox import RandomKeys
from streammerge.records import dataclass

A = TypeVar("A")
_A = TypeVar("_A", covariant=True)

Range = tuple[int, int, int]
"""A range of elements: (ordinal of the tensor, start, stop)."""

MOST_BINS = 1 << 19
"""The most bins in a window of magnitudes; more bins do not save passes."""
FEWEST_BINS = 1 << 12
"""The fewest bins in a window that a plan reserves memory for."""


class NotFiniteError(Exception):
    """A task vector contains NaN or infinity; the engine locates it."""

    def __init__(self, job: int) -> None:
        super().__init__(job)
        self.job = job


class Source(Enum):
    """The data that a statistic is computed from."""

    NOTHING = "nothing"
    """No data: the random stream, or numbers that are already recorded."""
    MODELS = "models"
    """Blocks of the base, the models and their Fisher diagonals."""
    FISHERS = "fishers"
    """Blocks of the Fisher diagonals alone."""
    GRAMS = "grams"
    """The models' whole Gram matrices; see `Statistic.of_grams`."""


@dataclass(frozen=True)
class Cost:
    """The cost of a statistic, in memory and in passes over its tensors."""

    windows: int = 0
    """Number of windows of counts. Each holds up to `most_bins` bins of 4 or 8 bytes, plus one copy per worker."""
    partials: int = 0
    """Number of fp64 partial sums per block of 4096 elements."""
    passes: int = 1
    """The usual number of passes over the tensors; 0 if no data is read."""


@dataclass(frozen=True)
class MeasuredTensor:
    """One tensor that a statistic is computed over."""

    ordinal: int
    """Index of the tensor in the order of the merge."""
    n: int
    """Elements."""
    name: str = ""
    """Canonical output name; it keys the random words."""
    columns: int = 1
    """Elements along all axes but the first; 1 for a tensor with one axis."""
    square_sums: tuple[float | None, ...] = ()
    """Sum of squares of each model's Fisher diagonal, where its store recorded one; empty without diagonals."""


@dataclass(frozen=True)
class Measurement:
    """The tensors that a statistic is computed over, and the limits of the computation."""

    tensors: Sequence[MeasuredTensor]
    """The tensors in the order of the merge."""
    keys: RandomKeys
    versions: Mapping[int, Any] = field(default_factory=dict)
    """Each tensor's own form of a statistic of the whole model, by ordinal."""
    tolerant: bool = False
    """Whether non-finite entries are ranked above all others; otherwise they raise `NotFiniteError`."""
    most_bins: int = MOST_BINS
    """The most bins in one window."""

    @property
    def n(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.n for tensor in self.tensors)


class Reducer(ABC, Generic[_A]):
    """A fold over blocks that yields the value of a statistic, in one pass or several.

    A subclass defines the part of one block (`measured`), the addition of a part (`absorb`), and the part of all blocks
    so far (`part`). Threads measure at the same time, and each adds its part. A pass may also be split over
    processes: each fills its own reducer (a pickled copy of this one from before the pass), and this one absorbs their
    parts before `end`. Parts are exact and do not depend on their order: integers add, and fp64 sums keep partial sums of
    blocks until all earlier blocks are there.
    """

    known: bool = False
    """Whether the value is known already, so that no pass is run for it."""
    wants: Range | None = None
    """The only elements that the next pass must read; None: all of them."""
    in_order: bool = False
    """Whether blocks must be added in order; then each part is handed on before the next block is added."""
    samples: bool = False
    """Whether a sample of blocks, added before the first pass, narrows what is counted; see `narrow_by_sample`."""
    reads_models: bool = True
    """Whether it reads the models; False: only their Fisher diagonals."""

    def measured(self, ordinal: int, start: int, n: int, math: BlockMath) -> Any:
        """Return the part of elements `start` to `start + n` of a tensor, which `math` holds; change nothing.

        Raises
        ------
        NotFiniteError
            If a value is not finite and non-finite values are not tolerated.
        """
        raise NotImplementedError

    def add(self, ordinal: int, start: int, n: int, math: BlockMath) -> None:
        """Measure a block and absorb its part; where blocks come in order, a subclass may do both at once."""
        self.absorb(self.measured(ordinal, start, n, math))

    def end(self) -> bool:
        """End a pass and return whether the value is known. By default one pass is enough."""
        return True

    @property
    @abstractmethod
    def value(self) -> _A:
        """The value, once `end` has returned True."""

    @abstractmethod
    def part(self) -> Any:
        """Return everything added in this pass, as a picklable value for `absorb` of a reducer in the same pass."""

    @abstractmethod
    def absorb(self, part: Any) -> None:
        """Add a part of the same pass, which nobody changes or uses afterwards; called from many threads."""

    @property
    def sampled_model(self) -> int | None:
        """The only model that a sample needs; None: all of them."""
        return None

    def narrow_by_sample(self) -> None:
        """Treat everything added so far as a sample, narrow the window by it, and start over."""
        return


class Known(Reducer[_A]):
    """A value that is known without a pass."""

    known = True

    def __init__(self, value: _A) -> None:
        self._value = value

    @property
    def value(self) -> _A:
        """The value."""
        return self._value

    def part(self) -> None:
        """Return nothing: nothing was added."""

    def absorb(self, part: None) -> None:
        """Add nothing."""


class Statistic(Generic[A]):
    """Something to compute over a tensor or over the whole model: a frozen dataclass whose fields specify it.

    A subclass has a field `extent` and defines `placeholder`, `reducer`, `to_json` and `from_json`; it defines `cost` too
    unless it takes one pass and no memory. Subclasses are listed in `KINDS`.
    """

    source: ClassVar[Source] = Source.MODELS

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        KINDS[f"{cls.__module__}.{cls.__qualname__}"] = cls

    @property
    def extent(self) -> Extent:
        """TENSOR, or MODEL for the whole model."""
        return Extent.TENSOR

    @property
    def cost(self) -> Cost:
        """Its cost in memory and passes."""
        return Cost(passes=int(self.source in (Source.MODELS, Source.FISHERS)))

    def calls(self) -> Sequence[Call]:
        """Return the methods of `BlockMath` that its reducer calls, so that their kernels are compiled beforehand."""
        return ()

    def reads(self, tensor: MeasuredTensor) -> bool:
        """Return whether it needs the blocks of this tensor."""
        return self.source in (Source.MODELS, Source.FISHERS)

    @property
    def common(self) -> tuple[object, ...]:
        """The part of a whole-model statistic that must be equal for all tensors."""
        return (type(self),)

    def placeholder(self) -> A:
        """Return some value of the right type; the planner uses it to follow a method without data."""
        raise NotImplementedError

    def reducer(self, over: Measurement) -> Reducer[A]:
        """Return the reducer that computes it over some tensors, or its value if that needs no data."""
        raise NotImplementedError

    def of_grams(self, grams: list[NDArray[np.float32]]) -> A:
        """Return its value from the models' Gram matrices, (inputs, inputs) each; it may remove them from the list."""
        raise NotImplementedError

    def to_json(self, value: A) -> object:
        """Return a value in a form that JSON holds exactly; None: too large to record, so it is computed again."""
        return None

    def from_json(self, plain: Any) -> A:
        """Return the value that `to_json` converted.

        Raises
        ------
        ValueError
            If `to_json` cannot have produced it.
        """
        raise ValueError(f"no value of {type(self).__name__}")


KINDS: dict[str, type[Statistic[Any]]] = {}
"""Every imported kind of statistic, by its dotted name."""


class Lock:
    """A lock that pickles as a new lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


def integers(plain: Any) -> tuple[int, ...]:
    """Return a JSON list of integers as a tuple; raise ValueError if it is not one."""
    if not isinstance(plain, list) or not all(type(number) is int for number in plain):
        raise ValueError("not a list of integers")
    return tuple(plain)


def hex_of(number: float) -> str:
    """Return an fp64 number as text that JSON holds exactly."""
    return number.hex()


def from_hex(text: Any) -> float:
    """Return the fp64 number of a text from `hex_of`; raise ValueError if it is not one."""
    try:
        return float.fromhex(text)
    except (OverflowError, TypeError):
        raise ValueError("not an fp64 number") from None
