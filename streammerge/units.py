"""Sizes and durations as people write them."""

from __future__ import annotations

import math
import re

from streammerge.errors import InputError
from streammerge.lazy import late_pattern

_FACTORS = {
    "": 1,
    "b": 1,
    **{f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgtp")},
    **{p: 1000 ** (i + 1) for i, p in enumerate("kmgtp")},
    **{f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgtp")},
}
_SIZE = late_pattern(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Return the bytes that `text` names.

    >>> parse_size("2GiB"), parse_size("5GB"), parse_size("512MiB"), parse_size("1000")
    (2147483648, 5000000000, 536870912, 1000)

    Raises
    ------
    InputError
        If `text` is not a positive size.
    """
    match = _SIZE.fullmatch(text.strip()) if len(text) <= 64 else None
    factor = _FACTORS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise InputError(f"{text[:64]!r} is not a size: write 512MiB, 2GiB, 5GB or plain bytes")
    nbytes = int(float(match.group(1)) * factor) if "." in match[1] else int(match[1]) * factor
    if nbytes <= 0:
        raise InputError(f"{text!r} is not a positive size")
    return nbytes


def format_size(nbytes: float) -> str:
    """Return `nbytes` with a binary unit and about three digits: ``'1.5 GiB'``."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_share(done: float, whole: float | None) -> str:
    """Return a part of a size, with the unit once if both share it.

    >>> format_share(3 << 29, 7 << 30), format_share(5 << 20, 7 << 30), format_share(5 << 20, None)
    ('1.5 of 7.0 GiB', '5.0 MiB of 7.0 GiB', '5.0 MiB')
    """
    part = format_size(done)
    if whole is None:
        return part
    total = format_size(whole)
    number, unit = part.split(" ")
    return f"{number if total.endswith(' ' + unit) else part} of {total}"


def plural(count: int, noun: str, many: str = "") -> str:
    """Return a number with its noun.

    >>> plural(1, "chunk"), plural(1200, "chunk"), plural(2, "pass", "passes")
    ('1 chunk', '1,200 chunks', '2 passes')
    """
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def format_at_least(nbytes: float) -> str:
    """Return a size of no less than `nbytes`, in whole MiB, that `parse_size` takes: ``'1025 MiB'``."""
    return f"{-(-math.ceil(nbytes) // (1 << 20))} MiB"


def format_seconds(seconds: float, *, coarse: bool = False) -> str:
    """Return a duration a person reads at a glance: ``'8.3 s'``, ``'4 min 10 s'``, ``'2 h 05 min'``.

    With `coarse`, only as precise as an estimate deserves.

    >>> format_seconds(8.31), format_seconds(8.31, coarse=True), format_seconds(700, coarse=True)
    ('8.3 s', '8 s', '12 min')
    """
    if not math.isfinite(seconds):
        return "?"
    if coarse and seconds < 90:
        return f"{max(1, round(seconds))} s"
    if coarse and seconds < 5400:
        return f"{round(seconds / 60)} min"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def nbytes_of(size: str | int | None) -> int | None:
    """Return a size that a user gave as text or as a number, in bytes; None if none was given."""
    return parse_size(size) if isinstance(size, str) else size
