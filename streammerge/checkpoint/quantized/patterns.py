"""Match layer names with the regular expressions in a model's files, in bounded time for any expression."""

from __future__ import annotations

import re
from functools import lru_cache

from streammerge.lazy import late_pattern

_LONGEST = 400
"""Most characters of an expression."""
_MOST_CHOICES = 12
"""Most alternatives in an expression."""
_PLAIN = late_pattern(r"(?:[\w^$|()\[\]:/-]|\\[.dw/_-]|\(\?:|\.)*", re.ASCII)
"""A part without quantifiers; the time to match it depends only on its length."""


def matches(expression: str, name: str) -> bool:
    """Return whether an expression matches at the beginning of a name, as `re.match` does.

    The expression may have ``.*`` and ``.+`` between its parts, outside brackets, and no other quantifier. Each part
    is then searched after the previous one, without backtracking.

    Raises
    ------
    ValueError
        If the expression has a different form.

    >>> matches(r".*self_attn\\.(q|k)_proj$", "model.layers.0.self_attn.k_proj")
    True
    """
    at = 0
    for i, part in enumerate(_parts(expression)):
        found = part.search(name, at) if i else part.match(name)
        if found is None:
            return False
        at = found.end()
    return True


@lru_cache(maxsize=256)
def _parts(expression: str) -> tuple[re.Pattern[str], ...]:
    parts = re.split(r"(?<!\\)\.\*", re.sub(r"(?<!\\)\.\+", "..*", expression))
    fine = len(expression) <= _LONGEST and expression.count("|") <= _MOST_CHOICES
    fine = fine and not (len(parts) > 1 and any(map(_has_choice_outside, parts)))
    if not fine or not all(_PLAIN.fullmatch(part) for part in parts):
        raise ValueError(f"too free: {expression}")
    try:
        return tuple(re.compile(part) for part in parts)
    except (re.error, RecursionError, OverflowError):
        raise ValueError(f"not free of errors: {expression}") from None


def _has_choice_outside(part: str) -> bool:
    """Return whether a part has alternatives outside brackets, which would split the whole expression."""
    depth = 0
    for mark in re.sub(r"\\.", "", part):
        depth += (mark == "(") - (mark == ")")
        if mark == "|" and depth <= 0:
            return True
    return False
