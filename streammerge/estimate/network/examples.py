"""Examples to run a model on: one JSON object per line; examples are run one by one, without padding.

A line has ``text``, or ``input_ids`` (which need no tokenizer), and ``label`` if a classifier's own labels are used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.errors import ModelError, printable
from streammerge.io.files import open_regular, place
from streammerge.io.strict_json import parse_object
from streammerge.records import dataclass
from streammerge.units import plural

_LONGEST_LINE = 1 << 26
"""Bytes; a line is held in memory."""

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Example:
    """One sequence."""

    number: int
    """Index in the file, from 0; random draws depend on it."""
    ids: NDArray[np.int64]
    label: int | None = None

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class Reading:
    """Settings for turning lines of a file into examples."""

    max_length: int
    """Tokens after which an example is cut."""
    min_length: int
    """Minimum number of tokens: 2 if each token is predicted from those before it."""
    vocabulary: int
    """Upper bound (exclusive) of token ids."""
    tokenize: Callable[[], Tokenize]
    """Function that makes the tokenizer; called if a line has text."""
    labels: Mapping[str, int] | int | None = None
    """A classifier's label numbers by name, or the number of labels; None if labels are not read."""


def too_few(path: str, asked: int | None, found: int) -> str | None:
    """Return a warning if a file has fewer examples than requested, else None.

    >>> too_few("math.jsonl", 512, 3)
    'math.jsonl: has 3 examples, 512 were asked for: all 3 are used'
    """
    if asked is None or found >= asked:
        return None
    return f"{place(path)}: has {plural(found, 'example')}, {asked} were asked for: all {found} are used"


def read_examples(path: str, limit: int | None, how: Reading) -> list[Example]:
    """Return the first `limit` examples of a file of JSON lines, shortest first; equal lengths keep their order.

    Empty lines are skipped.

    Raises
    ------
    ModelError
        If the file or a line is malformed; the message gives the line's number.
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
                    f"the tokenizer returns id {max(ids)}, but the model has {how.vocabulary} ids: check the tokenizer",
                )
        else:
            raise _bad(path, where, "has neither text (a string) nor input_ids")
        ids = ids[: how.max_length]
        if len(ids) < how.min_length:
            raise _bad(path, where, f"has {len(ids)} tokens, but an example needs at least {how.min_length}")
        label = None if how.labels is None else _label(fields, how.labels, path, where)
        examples.append(Example(len(examples), np.asarray(ids, np.int64), label))
    if not examples:
        raise ModelError(f"{place(path)}: contains no example")
    return sorted(examples, key=lambda example: example.length)


def digest(examples: Sequence[Example]) -> str:
    """Return a digest of the examples' tokens and labels, independent of the file."""
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
    """Yield the number (from 1) and the bytes of every non-empty line."""
    with open(open_regular(path), "rb") as file:
        number = 0
        while raw := file.readline(_LONGEST_LINE + 1):
            number += 1
            if len(raw) > _LONGEST_LINE:
                raise _bad(path, f"line {number}", f"is longer than {_LONGEST_LINE} bytes")
            if raw.strip():
                yield number, raw
