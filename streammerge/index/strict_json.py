"""JSON from strangers: no duplicate keys, no NaN, no lone surrogates, no deep nesting, bounded size."""

from __future__ import annotations

import json
from typing import Any


class BadJson(ValueError):
    """The text is not acceptable JSON; the message says why, in a few words."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise BadJson(f"key {twice[:80]!r} appears twice")
    return result


def _constant(name: str) -> Any:
    raise BadJson(f"{name} is not a JSON number")


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise BadJson("an integer has more than 20 digits")
    return int(digits)


def parse_object(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in `raw`.

    Raises
    ------
    BadJson
        For anything but one UTF-8 object without duplicate keys, NaN or lone surrogates.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise BadJson("not UTF-8") from None
    try:
        value = json.loads(
            text, object_pairs_hook=_pairs, parse_constant=_constant, parse_int=_integer
        )
    except BadJson:
        raise
    except RecursionError:
        raise BadJson("nested too deeply") from None
    except ValueError as error:
        raise BadJson(f"not JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadJson("not a JSON object")
    if "\\u" in text:
        _refuse_surrogates(value)
    return value


def _refuse_surrogates(value: Any) -> None:
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadJson("a string holds a lone surrogate") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _refuse_surrogates(key)
            _refuse_surrogates(item)
    elif isinstance(value, list):
        for item in value:
            _refuse_surrogates(item)
