"""Expressions that a model's files give for names of layers, matched in time that no expression can stretch."""

from __future__ import annotations

import re
from functools import lru_cache

_LONGEST = 400
"""Characters of an expression."""
_MOST_CHOICES = 12
"""Alternatives in it."""
_PLAIN = re.compile(r"(?:[\w^$|()\[\]:/-]|\\[.dw/_-]|\(\?:|\.)*", re.ASCII)
"""A part without quantifiers: what it takes to match it grows with its length alone."""


def matches(expression: str, name: str) -> bool:
    """Return whether an expression matches from the beginning of a name on, as `re.match` does.

    The expression may have ``.*`` and ``.+`` between its parts, outside of brackets, and no other quantifier: each part is
    then looked for behind the one before, which needs no way back.

    Raises
    ------
    ValueError
        If it is not of that kind.

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
    """Return whether a part has alternatives that no brackets hold together, so that it is no part of one."""
    depth = 0
    for mark in re.sub(r"\\.", "", part):
        depth += (mark == "(") - (mark == ")")
        if mark == "|" and depth <= 0:
            return True
    return False
