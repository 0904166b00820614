"""Quantised weights decoded on the device: codes and scales went there as they are stored, values come to lie there.

A kind of decoding is a class that `streammerge.tensors.coded` describes codes by; its function here enqueues one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from streammerge.backends.fused.launcher import Launcher
from streammerge.backends.fused.specs import kernel_specs
from streammerge.backends.fused.tables import bits
from streammerge.tensors.coded.floats import PlainFloats, ScaledFloats
from streammerge.tensors.coded.integers import ScaledIntegers
from streammerge.tensors.coded.tables import Looked, TwiceScaled

KINDS: Mapping[str, int] = {"F8_E4M3": 0, "F8_E5M2": 1, "F4_E2M1": 2}
"""The number of each kind of codes, as in `streammerge.numerics.decoding`."""
Call = tuple[str, int, tuple[int, ...]]
"""A kernel, the number of elements that it decodes, and its arguments."""
Decode = Callable[[Any, Sequence[int], int], Call]
"""Function of a decoding, the device addresses of its arrays (0: empty), and that of the first element written."""
_F = TypeVar("_F", bound=Decode)
_DECODERS: dict[type[Any], Decode] = {}


def _decodes(kind: type[Any]) -> Callable[[_F], _F]:
    def register(function: _F) -> _F:
        _DECODERS[kind] = function
        return function

    return register


def decoded_kinds() -> frozenset[type[Any]]:
    """Return the classes of decodings that have a kernel."""
    return frozenset(_DECODERS)


def value_bytes(decoding: Any) -> int:
    """Return the bytes of a decoded element."""
    return 2 if isinstance(decoding, PlainFloats) else 4


def enqueue_decoding(launcher: Launcher, decoding: Any, arrays: Sequence[int], out: int) -> None:
    """Enqueue the kernel that decodes what a step of `streammerge.tensors.coded` brought.

    Parameters
    ----------
    arrays
        The device addresses of its arrays; 0 for one that is empty.
    out
        The device address of the first element that it writes.
    """
    name, n, arguments = _DECODERS[type(decoding)](decoding, arrays, out)
    spec = kernel_specs()[name]
    launcher.launch(spec, (spec.programs(n), 1), arguments)


@_decodes(ScaledFloats)
def _scaled_floats(how: ScaledFloats, arrays: Sequence[int], out: int) -> Call:
    codes, scales = arrays
    rows, columns = how.shape
    where = (*how.place, rows, columns, *how.extent)
    raw = (KINDS[how.element], codes, how.skip, how.pitch, scales, int(how.powers), how.groups)
    return "decode", rows * columns, (*raw, *where, out, *how.steps)


@_decodes(PlainFloats)
def _plain_floats(how: PlainFloats, arrays: Sequence[int], out: int) -> Call:
    return "widen_codes", how.n, (KINDS[how.element], arrays[0], how.n, out)


@_decodes(ScaledIntegers)
def _scaled_integers(how: ScaledIntegers, arrays: Sequence[int], out: int) -> Call:
    codes, scales, zeros, listed = arrays
    order = sum(position << (4 * place) for place, position in enumerate(how.order))
    words = (codes, how.across_pitch, how.word_pitch, how.bits, how.skip, order, int(how.down))
    groups = (zeros, scales, how.groups, listed, *how.place, *how.shape, *how.extent)
    arguments = (*words, how.flip, how.offset, *groups, how.divisor, out, how.row_step)
    return "decode_integers", how.shape[0] * how.shape[1], arguments


@_decodes(TwiceScaled)
def _twice_scaled(how: TwiceScaled, arrays: Sequence[int], out: int) -> Call:
    codes, scales = arrays
    whole = (bits(how.factor), int(how.divides))
    return "decode_twice_scaled", how.n, (codes, how.skip, scales, how.before, how.group, *whole, how.n, out)


@_decodes(Looked)
def _looked(how: Looked, arrays: Sequence[int], out: int) -> Call:
    codes, table, scales = arrays
    place = (how.before, how.group, how.n, out)
    return "look_up", how.n, (codes, how.skip, int(how.high_first), table, scales, *place)
