"""Changes of JSON that keep most of it sound: numbers, texts, pairs taken out, doubled and swapped."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

Blind = Callable[[bytes], bytes]
"""Changes bytes without knowing what they are."""


class Pairs(list):
    """A JSON object as its (key, value) pairs: it can have a key twice, which a dict cannot."""


NUMBERS = [
    0, 1, 2, 3, 4, 8, 64, 65, 255, 4096, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63,
    2**64 - 1, 2**64, 10**30, 10**400, -1, -4, 0.0, 1.0, -0.0, 0.5, 1e308,
]  # fmt: skip


RAW = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-0",
    "9" * 30,
    "9" * 5000,
    "1e5",
    '"\\ud800"',
    "[[[[[[[[1]]]]]]]]",
]
"""JSON (or nearly) that `json.dumps` would not write."""


TEXTS = [
    "",
    "a",
    "b",
    "w",
    "F32",
    "BF16",
    "F4",
    "F6_E2M3",
    "U8",
    "BOOL",
    "C64",
    "I64",
    "f32",
    "..",
    "/",
    "../x",
    "\0",
    "\n",
    "\x1b[31m",
    "\u202e",
    "模型",
    "😀",
    "n" * 300,
    "x" * 5000,
    "__metadata__",
    "model.safetensors",
]


class Raw(str):
    """A value that is written into the JSON as it is."""


def parse_json(raw: bytes) -> Any:
    """Return JSON with its objects as `Pairs`; None for what is no JSON."""
    try:
        return json.loads(raw.decode(), object_pairs_hook=Pairs)
    except (ValueError, RecursionError):
        return None


def render_json(value: Any) -> str:
    """Return the JSON of a value with `Pairs` and `Raw` in it."""
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{render_json(item)}" for key, item in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(render_json, value)) + "]"
    if isinstance(value, Raw):
        return str(value)
    try:
        return json.dumps(value)
    except ValueError:  # an integer of more digits than Python writes
        return "9" * 5000


def any_json(rng: Random, texts: list[str] = TEXTS, depth: int = 0) -> Any:
    """Return some value, often one at a limit."""
    kind = rng.randrange(8 if depth < 2 else 5)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind in (1, 2):
        return rng.choice(NUMBERS)
    if kind == 3:
        return rng.choice(texts)
    if kind == 4:
        return Raw(rng.choice(RAW))
    items = [any_json(rng, texts, depth + 1) for _ in range(rng.randrange(4))]
    return items if kind < 7 else Pairs((rng.choice(texts), item) for item in items)


def change_json(value: Any, rng: Random, texts: list[str] = TEXTS, times: int = 3) -> Any:
    """Return `value`, changed at up to `times` places; it is changed itself."""
    root = [value]
    for _ in range(rng.randint(1, times)):
        holders = _holders(root)
        holder = rng.choice(holders)
        if not holder:
            holder.append(("a", any_json(rng, texts)) if isinstance(holder, Pairs) else any_json(rng, texts))
            continue
        i = rng.randrange(len(holder))
        if isinstance(holder, Pairs):
            _change_pair(holder, i, rng, texts, holders)
        elif holder is root:
            if rng.random() < 0.05:
                root[0] = any_json(rng, texts)
        else:
            _change_item(holder, i, rng, texts, holders)
    return root[0]


def _holders(root: list[Any]) -> list[list[Any]]:
    found = [root]
    for holder in found:
        for item in holder:
            inner = item[1] if isinstance(holder, Pairs) else item
            if isinstance(inner, list) and len(found) < 500:
                found.append(inner)
    return found


def _new_value(old: Any, rng: Random, texts: list[str], holders: list[list[Any]]) -> Any:
    if type(old) is int and rng.random() < 0.7:
        return rng.choice([old + 1, old - 1, old * 2, old // 2, old + 4, -old, rng.choice(NUMBERS)])
    if isinstance(old, str) and rng.random() < 0.5:
        return rng.choice([old + "x", old[1:], old.upper(), old * 2, rng.choice(texts)])
    if rng.random() < 0.2:  # Bytes from somewhere else, copied.
        copied = parse_json(render_json(rng.choice(holders[1:] or holders)).encode()[:20_000])
        return copied if copied is not None else 0
    return any_json(rng, texts)


def _change_item(holder: list[Any], i: int, rng: Random, texts: list[str], holders: list[list[Any]]) -> None:
    what = rng.randrange(6)
    if what == 0:
        del holder[i]
    elif what == 1:
        holder.insert(i, holder[i])
    elif what == 2:
        j = rng.randrange(len(holder))
        holder[i], holder[j] = holder[j], holder[i]
    else:
        holder[i] = _new_value(holder[i], rng, texts, holders)


def _change_pair(holder: Pairs, i: int, rng: Random, texts: list[str], holders: list[list[Any]]) -> None:
    key, value = holder[i]
    what = rng.randrange(8)
    if what == 0:
        del holder[i]
    elif what == 1:
        holder.insert(rng.randrange(len(holder) + 1), holder[i])
    elif what == 2:
        holder[i] = (rng.choice([*texts, key + "x", key.upper()]), value)
    elif what == 3:
        holder.append((rng.choice(texts), any_json(rng, texts)))
    elif what == 4:
        j = rng.randrange(len(holder))
        (a, x), (b, y) = holder[i], holder[j]
        holder[i], holder[j] = (a, y), (b, x)
    else:
        holder[i] = (key, _new_value(value, rng, texts, holders))


def json_text(raw: bytes, rng: Random, blind: Blind, texts: list[str] = TEXTS) -> bytes | None:
    """Change a JSON text as a tree."""
    value = parse_json(raw)
    if value is None:
        return None
    return render_json(change_json(value, rng, texts)).encode("utf-8", "surrogatepass")
