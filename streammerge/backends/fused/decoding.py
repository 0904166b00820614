"""Quantised weights decoded on the device: codes and scales go there as they are stored, fp32 comes to lie there.

Each function enqueues one kernel. Arguments are those of the function of the same name in `streammerge.numerics`, with device
addresses in place of arrays.
"""

from __future__ import annotations

from collections.abc import Mapping

from streammerge.backends.fused.launcher import Launcher
from streammerge.backends.fused.specs import kernel_specs

KINDS: Mapping[str, int] = {"F8_E4M3": 0, "F8_E5M2": 1, "F4_E2M1": 2}
"""The number of each kind of codes, as in `streammerge.numerics.decoding`."""
Pair = tuple[int, int]
"""Rows and columns."""


def _enqueue(launcher: Launcher, name: str, n: int, *arguments: int) -> None:
    spec = kernel_specs()[name]
    launcher.launch(spec, (spec.programs(n), 1), arguments)


def decode(
    launcher: Launcher,
    kind: str,
    codes: int,
    skip: int,
    pitch: int,
    scales: int,
    groups: int,
    place: Pair,
    shape: Pair,
    extent: Pair,
    out: int,
) -> None:
    """Write ``value(code) * scale`` for a rectangle of a matrix; a row of `scales` has `groups` of them."""
    where = (*place, *shape, *extent)
    n = shape[0] * shape[1]
    _enqueue(launcher, "decode", n, KINDS[kind], codes, skip, pitch, scales, groups, *where, out)


def unpack(
    launcher: Launcher, raw: int, pitch: int, skip: int, bits: int, shifts: int, shape: Pair, out: int
) -> None:
    """Write integers of a few bits, one to a byte; `shifts` are eight positions in bits, int64.

    The last line of `raw` is followed by a byte that may be read.
    """
    _enqueue(launcher, "unpack", shape[0] * shape[1], raw, pitch, skip, bits, shifts, *shape, out)


def scale_integers(
    launcher: Launcher,
    codes: int,
    pitch: int,
    flip: int,
    offset: int,
    zeros: int,
    scales: int,
    groups: int,
    columns_of: int,
    place: Pair,
    shape: Pair,
    extent: Pair,
    divisor: int,
    out: int,
    out_pitch: int,
) -> None:
    """Write ``(integer - zero point) * scale / divisor`` for a rectangle of a matrix.

    The addresses of `zeros` and `columns_of` are 0 if there are none; a row of `scales` has `groups` of them.
    """
    grid = (codes, pitch, flip, offset, zeros, scales, groups, columns_of)
    where = (*place, *shape, *extent)
    _enqueue(launcher, "scale_integers", shape[0] * shape[1], *grid, *where, divisor, out, out_pitch)


def look_up(
    launcher: Launcher,
    raw: int,
    skip: int,
    high_first: bool,
    tables: int,
    rows: int,
    before: int,
    group: int,
    n: int,
    out: int,
) -> None:
    """Write the values that `n` codes of 4 bits have in the table of their group: MXFP4, NVFP4, NF4."""
    _enqueue(launcher, "look_up", n, raw, skip, int(high_first), tables, rows, before, group, n, out)
