"""The contract of a statistic: a question about tensors that is answered exactly, before they are merged.

A statistic is one class in one file: its question (its fields), its cost, its value to and from JSON, and its reducer.
The planner, the engine and the backends know this contract and no kind of it, so a new kind is a new file. A method
asks by ``value = yield from ask(TopK(...))``; how that is answered (in memory, streamed, by several processes, over one
tensor or the whole model) is the engine's concern, and does not change the value.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from streammerge.algebra.block import BlockMath, Call
from streammerge.algebra.extent import Extent
from streammerge.numerics.philox import RandomKeys

A = TypeVar("A")
_A = TypeVar("_A", covariant=True)

Range = tuple[int, int, int]
"""(ordinal of a tensor, start, stop)"""

MOST_BINS = 1 << 19
"""Counts of a window of magnitudes: more of them do not make fewer passes."""
FEWEST_BINS = 1 << 12
"""Counts of a window that a plan leaves room for, at least."""


class NotFiniteError(Exception):
    """A task vector holds a NaN or an infinity; the engine finds out where."""

    def __init__(self, job: int) -> None:
        super().__init__(job)
        self.job = job


class Source(Enum):
    """The data that a statistic is taken from."""

    NOTHING = "nothing"
    """No data: the random stream, or numbers that are recorded already."""
    MODELS = "models"
    """Blocks of the base, the models and their Fisher diagonals."""
    FISHERS = "fishers"
    """Blocks of the Fisher diagonals alone."""
    GRAMS = "grams"
    """The models' Gram matrices, whole: see `Statistic.of_grams`."""


@dataclass(frozen=True)
class Cost:
    """What it costs to take a statistic, in memory and in passes over its tensors."""

    windows: int = 0
    """Windows of counts: each has up to `most_bins` of 4 or 8 bytes, and one more for each worker."""
    partials: int = 0
    """fp64 partial sums for each block of 4096 elements."""
    passes: int = 1
    """Passes over the tensors, as a rule; 0 where no data is read."""


@dataclass(frozen=True)
class MeasuredTensor:
    """One tensor that a statistic is taken over."""

    ordinal: int
    """Its number in the order of the merge."""
    n: int
    """Elements."""
    name: str = ""
    """Canonical output name; it keys the random words."""
    columns: int = 1
    """Elements of what lies along all axes but the first; 1 for a tensor of one axis."""
    square_sums: tuple[float | None, ...] = ()
    """For each model, the sum of squares of its Fisher diagonal, if a store recorded it; empty without diagonals."""


@dataclass(frozen=True)
class Measurement:
    """The tensors over which a statistic is taken, and the limits within which."""

    tensors: Sequence[MeasuredTensor]
    """In order."""
    keys: RandomKeys
    versions: Mapping[int, Statistic[Any]] = field(default_factory=dict)
    """Each tensor's own version of a statistic of the whole model, by ordinal."""
    tolerant: bool = False
    """Whether entries that are not finite are ranked, above all others, instead of raising `NotFiniteError`."""
    most_bins: int = MOST_BINS
    """Counts of one window, at most."""

    @property
    def n(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.n for tensor in self.tensors)


class Reducer(Protocol[_A]):
    """Reduces blocks to the value of a statistic, in one pass or in several.

    `add` may be called from many threads. A pass may also be split over processes: each fills a reducer of its own (a
    pickled copy of this one before the pass), and this one absorbs their parts before `end`. Parts are exact and
    order-free: integers add; fp64 sums keep the partial sums of blocks until all before them are there.
    """

    wants: Range | None = None
    """The only elements that the next pass needs; None: all of them."""
    in_order: bool = False
    """Whether blocks must come one after the other: then a part is handed on before the next block is added."""
    samples: bool = False
    """Whether some blocks, added before the first pass, narrow down what it must count: see `narrow_by_sample`."""
    reads_models: bool = True
    """Whether it looks at the models, not at their Fisher diagonals alone."""

    @abstractmethod
    def add(self, ordinal: int, start: int, n: int, math: BlockMath) -> None:
        """Take into account `n` elements of a tensor, from element `start` on; `math` holds them.

        Raises
        ------
        NotFiniteError
            If a value is not finite and that cannot be tolerated.
        """

    def end(self) -> bool:
        """End a pass; return whether the value is known. One pass is enough unless a reducer says otherwise."""
        return True

    @property
    @abstractmethod
    def value(self) -> _A:
        """The value, once `end` has returned True."""

    @abstractmethod
    def part(self) -> Any:
        """Return what was added in this pass: a value that pickles, for `absorb` of a reducer in the same pass."""

    @abstractmethod
    def absorb(self, part: Any) -> None:
        """Take into account what another reducer was given in this pass."""

    @property
    def sampled_model(self) -> int | None:
        """The one model that a sample must hold; None: all of them."""
        return None

    def narrow_by_sample(self) -> None:
        """Take what was added so far as a sample of blocks, and start over with what it tells."""
        return


class Known(Generic[_A]):
    """A value that takes no pass."""

    def __init__(self, value: _A) -> None:
        self.value = value


class Statistic(Generic[A]):
    """A question about one tensor or about the whole model; a frozen dataclass whose fields say which.

    A subclass has a field `extent`, and defines `placeholder`, `reducer`, `to_json`, `from_json` and, where it differs
    from one pass without memory, `cost`. Subclasses are listed in `KINDS`.
    """

    source: ClassVar[Source] = Source.MODELS

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        KINDS[f"{cls.__module__}.{cls.__qualname__}"] = cls

    @property
    def extent(self) -> Extent:
        """The tensor, or the whole model."""
        return Extent.TENSOR

    @property
    def cost(self) -> Cost:
        """What it costs to take it."""
        return Cost(passes=int(self.source in (Source.MODELS, Source.FISHERS)))

    def calls(self) -> Sequence[Call]:
        """Return which methods of `BlockMath` its reducer calls, so that their kernels are compiled before."""
        return ()

    def reads(self, tensor: MeasuredTensor) -> bool:
        """Return whether blocks of this tensor must be read for it."""
        return self.source in (Source.MODELS, Source.FISHERS)

    @property
    def common(self) -> tuple[object, ...]:
        """What must be the same in every tensor that it is taken over, where it is of the whole model."""
        return (type(self),)

    def placeholder(self) -> A:
        """Return a value of the right type, to follow a method without data."""
        raise NotImplementedError

    def reducer(self, over: Measurement) -> Reducer[A] | Known[A]:
        """Return what takes it over some tensors, or its value where no data is needed for it."""
        raise NotImplementedError

    def of_grams(self, grams: list[NDArray[np.float32]]) -> A:
        """Return its value from the models' Gram matrices, (inputs, inputs) each; it may take them out of the list."""
        raise NotImplementedError

    def to_json(self, value: A) -> object:
        """Return a value as JSON holds it exactly; None: it is large, and is not recorded but taken anew."""
        return None

    def from_json(self, plain: Any) -> A:
        """Return the value that `to_json` made this of.

        Raises
        ------
        ValueError
            If it made nothing like it.
        """
        raise ValueError(f"no value of {type(self).__name__}")


KINDS: dict[str, type[Statistic[Any]]] = {}
"""Every kind of statistic that was imported, by its dotted name."""


class Lock:
    """A lock that a pickled copy of its owner has anew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


def integers(plain: Any) -> tuple[int, ...]:
    """Return a JSON list of integers as a tuple; ValueError if it is no such list."""
    if not isinstance(plain, list) or not all(type(number) is int for number in plain):
        raise ValueError("not a list of integers")
    return tuple(plain)


def hex_of(number: float) -> str:
    """Return an fp64 number as JSON holds it exactly."""
    return number.hex()


def from_hex(text: Any) -> float:
    """Return the fp64 number that `hex_of` made this of; ValueError if it made nothing like it."""
    try:
        return float.fromhex(text)
    except (OverflowError, TypeError):
        raise ValueError("not an fp64 number") from None
