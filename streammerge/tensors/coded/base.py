"""Steps of bringing a quantised tensor to a device, and the registry of what yields them for each kind of tensor.

A step reads codes, scales and what else decodes them into a slot. From there they are copied to the device as they are,
and one kernel decodes them (`streammerge.backends.fused.decoding`). A kind that registers nothing is decoded on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from numpy.typing import NDArray

from streammerge.formats.refs import Ref, RenamedRef, TensorRef
from streammerge.io.buffer_pool import Bytes
from streammerge.io.pages import slot_bytes
from streammerge.io.reader import Reader
from streammerge.records import dataclass

GRAIN = 16
"""Bytes; each array of a step begins at a multiple of it."""
MOST_ELEMENTS = 1 << 22
"""Elements of a step: their codes are 2 to 4 MiB, which a bus copies at full speed."""
MOST_SCALES = 1 << 17
"""Scales of a step, whose temporaries in this process's memory the tensor's scratch bytes cover."""


def aligned(nbytes: int) -> int:
    """Return the bytes that an array of a step takes."""
    return -(-nbytes // GRAIN) * GRAIN


@dataclass(frozen=True, slots=True)
class Codes:
    """What a step brings, and where its values go."""

    arrays: tuple[Bytes, ...]
    """Parts of the slot, in the order that the kind of decoding wants; those it lacks are empty."""
    decoding: Any
    """How they are decoded: an object of a class that `streammerge.backends.fused.decoding` knows."""
    first: int
    """The first element that is written, counted from the start of the range."""


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a range of a tensor."""

    nbytes: int
    """Most bytes of its arrays."""
    fill: Callable[[Reader, Bytes], Codes]
    """Function that reads them into a slot, whose first byte begins a page.

    It raises a ModelError if a scale is invalid, and a WorldError if a file ends early or the device fails.
    """


Steps = Callable[[Any, int, int, int], Iterator[Step]]
"""Function that yields the steps of a tensor, from its first element to the end, for slots of some bytes."""
_F = TypeVar("_F", bound=Steps)
_STEPS: dict[type[Any], Steps] = {}
_ACCEPTS: dict[type[Any], Callable[[Any], bool]] = {}


def _any(ref: Any) -> bool:
    return True


def codes_of(kind: type[Any], accepts: Callable[[Any], bool] = _any) -> Callable[[_F], _F]:
    """Register the steps of a kind of tensor; `accepts` returns whether a tensor of the kind is stored so."""

    def register(function: _F) -> _F:
        _STEPS[kind], _ACCEPTS[kind] = function, accepts
        return function

    return register


def coded_kinds() -> frozenset[type[Any]]:
    """Return the kinds of tensors that a device decodes."""
    return frozenset(_STEPS)


def is_coded(ref: Ref) -> bool:
    """Return whether a device can decode a tensor."""
    own = _own(ref)
    return type(own) in _STEPS and _ACCEPTS[type(own)](own)


def coded_steps(ref: Ref, start: int, stop: int, slot: int) -> Iterator[Step]:
    """Yield the steps that bring elements `start` to `stop` of a tensor through slots of `slot` bytes."""
    own = _own(ref)
    return _STEPS[type(own)](own, start, stop, slot)


def _own(ref: Ref) -> Ref:
    return _own(ref.source) if isinstance(ref, RenamedRef) else ref


class Slot:
    """The arrays of a step in a slot, one after the other; the first is read past the page cache if that is faster."""

    def __init__(self, slot: Bytes) -> None:
        self._slot = slot
        self._end = 0

    def read(self, reader: Reader, tensor: TensorRef, first: int, nbytes: int) -> Bytes:
        """Read bytes of a tensor from byte `first` on."""
        assert not self._end, "codes come first, since they begin a page"
        begins = reader.read_slot(
            tensor.path, tensor.offset + first, nbytes, self._slot[: slot_bytes(nbytes)]
        )
        self._end = slot_bytes(nbytes)
        return self._slot[begins : begins + nbytes]

    def take(self, nbytes: int) -> Bytes:
        """Return room."""
        first, self._end = self._end, self._end + aligned(nbytes)
        assert self._end <= self._slot.size, (self._end, self._slot.size)
        return self._slot[first : first + nbytes]

    def put(self, values: NDArray[Any]) -> Bytes:
        """Copy an array."""
        room = self.take(values.nbytes)
        room.view(values.dtype)[:] = values.reshape(-1)
        return room


def in_slot(codes: int, others: int) -> int:
    """Return the bytes of a slot that some bytes of codes, and `others` of further arrays, take."""
    return slot_bytes(codes) + others
