"""Examples to run a model on: one JSON object a line, each for itself, never padded.

A line has ``text``, or ``input_ids`` (then no tokenizer is needed), and ``label`` where a classifier's own labels
are asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.errors import ModelError, printable
from streammerge.io.files import open_regular, place
from streammerge.io.strict_json import parse_object
from streammerge.units import plural

_LONGEST_LINE = 1 << 26
"""Bytes; a line is held whole."""

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Example:
    """One sequence."""

    number: int
    """Its place among the examples of the file, from 0: what its random draws depend on."""
    ids: NDArray[np.int64]
    label: int | None = None

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class Reading:
    """Settings by which the lines of a file become examples."""

    max_length: int
    """Tokens after which an example is cut."""
    min_length: int
    """Tokens an example must have: 2 where a token is predicted from those before it."""
    vocabulary: int
    """Ids lie below this."""
    tokenize: Callable[[], Tokenize]
    """Makes the tokenizer; called when a line has text."""
    labels: Mapping[str, int] | int | None = None
    """Numbers of a classifier's labels by name, or how many there are; None where labels are not read."""


def too_few(path: str, asked: int | None, found: int) -> str | None:
    """Return a warning where a file has fewer examples than were asked for; else None.

    >>> too_few("math.jsonl", 512, 3)
    'math.jsonl: has 3 examples, 512 were asked for: all 3 are used'
    """
    if asked is None or found >= asked:
        return None
    return f"{place(path)}: has {plural(found, 'example')}, {asked} were asked for: all {found} are used"


def read_examples(path: str, limit: int | None, how: Reading) -> list[Example]:
    """Return the first `limit` examples of a file of JSON lines, shortest first; equal lengths keep their order.

    Empty lines are passed over.

    Raises
    ------
    ModelError
        If the file or one of its lines is malformed; the line is named by its number.
    """
    tokenize: Tokenize | None = None
    examples: list[Example] = []
    for line, raw in _lines(path):
        if limit is not None and len(examples) == limit:
            break
        where = f"line {line}"
        fields = parse_object(raw, path, where, "finite")
        if "input_ids" in fields:
            ids = fields["input_ids"]
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < how.vocabulary for i in ids):
                raise _bad(
                    path, where, f"its input_ids are not a list of token ids from 0 to {how.vocabulary - 1}"
                )
        elif isinstance(fields.get("text"), str):
            tokenize = tokenize or how.tokenize()
            ids = tokenize(fields["text"])
            if ids and max(ids) >= how.vocabulary:
                raise _bad(
                    path,
                    where,
                    f"the tokenizer gives id {max(ids)}, the model knows {how.vocabulary}: is it the model's own?",
                )
        else:
            raise _bad(path, where, "has neither text (a string) nor input_ids")
        ids = ids[: how.max_length]
        if len(ids) < how.min_length:
            raise _bad(path, where, f"has {len(ids)} tokens, an example needs at least {how.min_length}")
        label = None if how.labels is None else _label(fields, how.labels, path, where)
        examples.append(Example(len(examples), np.asarray(ids, np.int64), label))
    if not examples:
        raise ModelError(f"{place(path)}: holds no example")
    return sorted(examples, key=lambda example: example.length)


def digest(examples: Sequence[Example]) -> str:
    """Return what identifies the examples: their tokens and labels, not the file they came from."""
    found = hashlib.blake2b(digest_size=16)
    for example in sorted(examples, key=lambda example: example.number):
        found.update(repr((example.length, example.label)).encode())
        found.update(np.ascontiguousarray(example.ids, "<i8").tobytes())
    return found.hexdigest()


def _label(fields: Mapping[str, Any], labels: Mapping[str, int] | int, path: str, where: str) -> int:
    label = fields.get("label")
    n = labels if isinstance(labels, int) else len(labels)
    if isinstance(label, str) and not isinstance(labels, int) and label in labels:
        return labels[label]
    if type(label) is int and 0 <= label < n:
        return label
    names = "" if isinstance(labels, int) else f" or one of {printable(', '.join(labels), 200)}"
    raise _bad(
        path, where, f"its label {printable(repr(label), 80)} is not a number from 0 to {n - 1}{names}"
    )


def _bad(path: str, where: str, what: str) -> ModelError:
    return ModelError(f"{place(path)}: {where} {what}")


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the bytes of every line that is not empty."""
    with open(open_regular(path), "rb") as file:
        number = 0
        while raw := file.readline(_LONGEST_LINE + 1):
            number += 1
            if len(raw) > _LONGEST_LINE:
                raise _bad(path, f"line {number}", f"is longer than {_LONGEST_LINE} bytes")
            if raw.strip():
                yield number, raw
