"""The words of a refusal: one bounded line that says where, what and the cure."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

from streammerge.errors import ConfigError, printable

PATH_LIMIT = 4096
"""Characters of the longest path a file can have."""
_LINE_LIMIT = 5000
"""Room for the longest path a file can have; every other part of a message is cut much earlier."""


def refuse(path: str, what: str) -> NoReturn:
    """Raise the ConfigError that says `what` is wrong at `path`."""
    raise ConfigError(printable(f"{path.removesuffix(':')}: {what}", _LINE_LIMIT))


def shown(value: object) -> str:
    """Return a short name for any value, whatever its size: aliases can make a list enormous.

    >>> shown("wieght"), shown(0.5), shown([[1]]), shown(None), shown(True)
    ("'wieght'", '0.5', 'a list', 'null', 'true')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"'{printable(value, 60)}'"
    if isinstance(value, float) or (isinstance(value, int) and value.bit_length() <= 200):
        return repr(value)
    if isinstance(value, int):
        return "an integer of many digits"
    if isinstance(value, Mapping):
        return "a map" if value else "an empty map"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    return f"a {type(value).__name__}"


def child(path: str, key: str) -> str:
    """Return the path of `key` under `path`; the path of the whole config ends with a colon.

    >>> child("config.yml:", "models"), child("config.yml: models[0]", "alias")
    ('config.yml: models', 'config.yml: models[0].alias')
    """
    return f"{path}{' ' if path.endswith(':') else '.'}{printable(key, 60)}"


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return the cure for a misspelt word: the nearest known one, or all of them.

    >>> suggestion("wieght", ["weight", "density"]), suggestion("x", ["weight", "density"])
    ("did you mean 'weight'?", 'known: weight, density')
    >>> suggestion("modles", ["models", "modules", "dtype"])
    "did you mean 'modules' or 'models'?"
    """
    words = list(known)
    near = [f"'{other}'" for other in _nearest(word, words)]
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(words)}"


def meant(word: str, known: Iterable[str], whole: Mapping[str, str] | None = None) -> str:
    """Return a suggestion of the nearest known words, to end a message with; empty if none is near.

    `whole` has the full text to show in place of a word that is only a part of it.

    >>> meant("self_atn", ["self_attn", "mlp"]), meant("x", ["self_attn", "mlp"])
    (" (did you mean 'self_attn'?)", '')
    """
    near = _nearest(word, list(known))
    if whole is not None:
        near = list(dict.fromkeys(f"'{printable(whole[other], 200)}'" for other in near))
    else:
        near = [f"'{printable(other, 200)}'" for other in near]
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _nearest(word: str, words: list[str]) -> list[str]:
    """Return the known word most similar to a given one, or two if both are very similar; case is ignored."""
    if len(word) > 60:
        return []
    spelled = {other.lower(): other for other in reversed(words)}
    near = difflib.get_close_matches(word.lower(), spelled, n=1)
    near += [
        other
        for other in difflib.get_close_matches(word.lower(), spelled, n=2, cutoff=0.8)
        if other not in near
    ]
    return [spelled[other] for other in near]


Cure = Callable[[str, object, Mapping[str, object]], str | None]
"""Returns a message about a key, its value and its map, if there is more to say than which keys are known."""


def check_keys(
    data: Mapping[str, object], path: str, known: Iterable[str], cure: Cure = lambda *key: None
) -> None:
    """Refuse keys that are unknown."""
    for key, value in data.items():
        if key not in known:
            better = cure(key, value, data)
            if better is not None:
                refuse(path, better)
            refuse(path, f"unknown key {shown(key)} ({suggestion(key, known)})")
