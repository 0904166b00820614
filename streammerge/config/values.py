"""Single values of a config: a dtype, a seed, a range of layers, patterns."""

from __future__ import annotations

import re
import warnings

from streammerge.config.references import parse_text
from streammerge.config.wording import meant, refuse, shown
from streammerge.dtypes import NAMES, SHORT_NAMES

QUANTIZE = ("none", "same", "fp8")
"""Values of the key `quantize`: floats, the format of the base (or first model), FP8 by blocks."""


def parse_layer_range(data: object, path: str) -> tuple[int, int]:
    """Return two layer numbers, the second exclusive; a number may be written as text, as templates of configs write it."""
    if isinstance(data, list):
        data = [int(n) if isinstance(n, str) and re.fullmatch(r"[0-9]{1,9}", n) else n for n in data]
    if not isinstance(data, list) or len(data) != 2 or not all(type(n) is int and n >= 0 for n in data):
        refuse(path, f"must be two layer numbers [first, end), not {shown(data)}")
    first, end = int(data[0]), int(data[1])
    if not first <= end <= 1_000_000:
        refuse(path, f"[{first}, {end}) ends before it begins" if first > end else f"{end} layers")
    return first, end


def parse_dtype(value: object, path: str) -> str | None:
    """Return the format code of a dtype; None if none is given."""
    if value is None:
        return None
    name = value.removeprefix("torch.").lower() if isinstance(value, str) else ""
    code = NAMES.get(SHORT_NAMES.get(name, name))
    if code is None:
        refuse(path, f"{shown(value)} is not one of {', '.join(NAMES)}{meant(name, [*NAMES, *SHORT_NAMES])}")
    return code


def parse_quantize(value: object, path: str) -> str:
    """Return the value of `quantize`; `none` if it is not given."""
    if value is None:
        return "none"
    name = value.lower() if isinstance(value, str) else ""
    if name not in QUANTIZE:
        refuse(path, f"{shown(value)} is not one of {', '.join(QUANTIZE)}{meant(name, QUANTIZE)}")
    return name


def parse_seed(value: object, path: str) -> int:
    """Return a seed of 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        refuse(path, f"must be an integer from 0 to 2**64 - 1, not {shown(value)}")
    return value


def parse_exclude(data: object, path: str) -> tuple[str, ...]:
    """Return regular expressions, compiled once to see that they are sound."""
    if isinstance(data, str):
        data = [data]
    if not isinstance(data, list):
        refuse(path, f"must be a list of regular expressions, not {shown(data)}")
    patterns = []
    for i, item in enumerate(data):
        place = f"{path}[{i}]"
        patterns.append(parse_text(item, place))
        if len(patterns[i]) > 1000:
            refuse(place, f"{len(patterns[i])} characters, at most 1000 (write several)")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                re.compile(patterns[i])
        except (re.error, OverflowError, RecursionError, Warning) as error:
            refuse(place, f"{shown(item)} is not a regular expression: {str(error)[:100]}")
    return tuple(patterns)
