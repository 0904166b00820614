"""Strict parsing of untrusted JSON, which the `json` module would accept too liberally.

The following raise a one-line `ModelError`: text that is not UTF-8, values that are not objects, duplicate keys, lone
surrogates, excessive nesting, excessive integers and, depending on `Numbers`, NaN, 1e999, fractions, negative numbers.
"""

from __future__ import annotations

import math
from json import JSONDecodeError, JSONDecoder
from typing import Any, Literal, NoReturn

from streammerge.io.files import bad, quoted, read_exactly, reading
from streammerge.lazy import late_pattern

MAX_NBYTES = 100_000_000
"""Largest JSON file in bytes; it is the safetensors format's limit for headers."""

MAX_MARKS = 5_000_000
"""Most brackets, braces and commas. Python needs up to 100 bytes for each, so this bounds the memory
(100 MB of ``[],[],`` would take 2.5 GB); half a million tensors have about as many."""

_ESCAPED_SURROGATE = late_pattern(rb"\\u[dD]")

Numbers = Literal["natural", "finite", "any"]
"""``natural``: integers >= 0; ``finite``: no NaN or infinity; ``any``: everything that Python writes."""


class _Refused(ValueError):
    """Raised in the parser's hooks, which do not know the file."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"has the key {quoted(key)} twice")
            seen.add(key)
    return found


def _refuse_surrogates(value: Any) -> None:
    """Refuse a lone surrogate in any string of `value`, keys included, however deep."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left += item.keys()
            left += item.values()
        elif isinstance(item, list):
            left += item
        elif isinstance(item, str) and not item.isascii():
            try:
                item.encode()
            except UnicodeEncodeError:
                raise _Refused("has a string that is not valid Unicode (a lone surrogate)") from None


def _natural(digits: str) -> int:
    if digits[0] == "-":
        raise _Refused(f"has the negative number {digits[:40]}")
    if len(digits) > 20:  # 2^64 - 1 has 20 digits.
        raise _Refused(f"has an integer of {len(digits)} digits")
    return int(digits)


def _integer(digits: str) -> int:
    if len(digits) > 400:  # `int` itself stops at 4300; tokenizers write 31 for "no limit".
        raise _Refused(f"has an integer of {len(digits)} digits")
    return int(digits)


def _no_float(digits: str) -> NoReturn:
    raise _Refused(f"has the number {digits[:40]} where a whole number is required")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _Refused(f"has the number {digits[:40]}, which is too large")
    return value


def _no_constant(name: str) -> NoReturn:
    raise _Refused(f"has {name}, which is not JSON")


_DECODERS: dict[Numbers, JSONDecoder] = {
    "natural": JSONDecoder(
        object_pairs_hook=_unique,
        parse_int=_natural,
        parse_float=_no_float,
        parse_constant=_no_constant,
    ),
    "finite": JSONDecoder(
        object_pairs_hook=_unique,
        parse_int=_integer,
        parse_float=_finite,
        parse_constant=_no_constant,
    ),
    "any": JSONDecoder(object_pairs_hook=_unique, parse_int=_integer),
}


def parse_object(
    raw: bytes, path: str, what: str, numbers: Numbers, max_marks: int = MAX_MARKS
) -> dict[str, Any]:
    """Parse `raw` as a JSON object; `path` and `what` (``"the header"``) appear in errors."""
    marks = sum(raw.count(mark) for mark in (b"[", b"{", b","))
    if marks > max_marks:
        raise bad(path, f"{what} has {marks} brackets and commas, more than {max_marks}")
    try:
        value = _DECODERS[numbers].decode(raw.decode())
        if _ESCAPED_SURROGATE.search(raw):  # UTF-8 itself has none.
            _refuse_surrogates(value)
    except UnicodeDecodeError as error:
        raise bad(path, f"{what} is not UTF-8 (byte {error.start})") from None
    except JSONDecodeError as error:
        raise bad(path, f"{what} is not JSON: {error.msg} (character {error.pos})") from None
    except RecursionError:
        raise bad(path, f"{what} is nested too deeply") from None
    except _Refused as error:
        raise bad(path, f"{what} {error}") from None
    if not isinstance(value, dict):
        raise bad(path, f"{what} is not a JSON object")
    return value


def read_object(path: str, numbers: Numbers = "any", max_marks: int = MAX_MARKS) -> dict[str, Any]:
    """Return the JSON object in the file `path`, of at most `MAX_NBYTES` and `max_marks` brackets and commas."""
    with reading(path) as (fd, status):
        nbytes = status.st_size
        if nbytes > MAX_NBYTES:
            raise bad(path, f"has {nbytes} bytes, more than {MAX_NBYTES}")
        raw = read_exactly(fd, nbytes, 0, path)
    return parse_object(raw, path, "the file", numbers, max_marks)
