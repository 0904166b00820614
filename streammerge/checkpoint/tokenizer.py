"""Read the vocabulary of a model, which maps tokens to rows of the embedding, from the files next to its weights.

The files are read as data; no tokenizer or other code runs. The vocabulary is in ``tokenizer.json`` if that exists,
else in ``vocab.json``, ``vocab.txt`` or a sentencepiece ``tokenizer.model``. Tokens that were added later are included.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from streammerge.errors import ModelError
from streammerge.io import volumes
from streammerge.io.files import bad, quoted, read_exactly, reading
from streammerge.io.strict_json import MAX_NBYTES, read_object
from streammerge.records import dataclass

FULL, SETTINGS, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
JINJA = "chat_template.jinja"
_WORDS, _LINES, _PIECES = "vocab.json", "vocab.txt", "tokenizer.model"
MOST_ROWS = 1 << 21
"""Most tokens of a vocabulary; the largest in use have 250 000."""
MOST_MARKS = 3_000_000
"""Most brackets and commas in a file; the largest tokenizers in use have two million, nearly all for merges."""
_LONGEST = 1 << 16


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """The vocabulary of one model."""

    directory: Path
    ids: Mapping[str, int]
    """The id of each token, ascending; if two texts share an id, the later one is in use."""
    added: Mapping[str, Mapping[str, Any]]
    """The declared properties of tokens that were added to the vocabulary: special, stripped, normalised."""

    @property
    def n_rows(self) -> int:
        """The highest id plus 1."""
        return max(self.ids.values(), default=-1) + 1


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """Return the tokenizer in a model's directory; None if there is none.

    Raises
    ------
    ModelError
        If its files are malformed, or of an unsupported kind.
    WorldError
        If the machine cannot read them.
    """
    settings = _object(directory / SETTINGS)
    ids: dict[str, int] = {}
    added: dict[str, Mapping[str, Any]] = {}
    for read in (_read_full, _read_words, _read_lines, _read_pieces):
        found = read(directory)
        if found is not None:
            ids, added = found
            break
    else:
        return None
    path = str(directory / ADDED)
    for token, number in _object(directory / ADDED).items():
        _put(ids, token, number, path)
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        path = str(directory / SETTINGS)
        for number, entry in decoder.items():
            if not isinstance(entry, dict) or not number.isdecimal() or len(number) > 9:
                raise bad(
                    path,
                    f"added_tokens_decoder: {quoted(number, 40)} is not the number of a token and what it is",
                )
            _put(ids, entry.get("content"), int(number), path)
            added.setdefault(entry["content"], entry)
    if any(a > b for a, b in itertools.pairwise(ids.values())):
        ids = dict(sorted(ids.items(), key=lambda item: item[1]))
    return Tokenizer(directory, ids, added)


def tokenizer_digest(directory: Path) -> str:
    """Return a digest of the files that a directory's vocabulary is read from, to compare vocabularies.

    Raises
    ------
    ModelError
        If a file is too large, or not a file.
    WorldError
        If the machine cannot read one.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in (FULL, _WORDS, _LINES, _PIECES, ADDED, SETTINGS):
        if volumes.lexists(directory / name):
            data = _bytes(directory / name)
            digest.update(repr((name, len(data))).encode() + data)
    return digest.hexdigest()


def _put(ids: dict[str, int], token: Any, number: Any, path: str) -> None:
    _check(token, number, path)
    ids[token] = number


def _check(token: object, number: object, path: str) -> None:
    if not isinstance(token, str) or len(token) > _LONGEST:
        raise bad(path, "a token that is no text, or a text without end")
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < MOST_ROWS:
        raise bad(path, f"token {quoted(token, 60)}: {quoted(str(number), 40)} is not the number of a token")


def _object(path: Path) -> dict[str, Any]:
    return read_object(str(path), max_marks=MOST_MARKS) if volumes.lexists(path) else {}


def _read_full(directory: Path) -> tuple[dict[str, int], dict[str, Mapping[str, Any]]] | None:
    """Read ``tokenizer.json``: the vocabulary, a map or (for Unigram) a list, and the added tokens."""
    if not volumes.lexists(directory / FULL):
        return None
    path = str(directory / FULL)
    data = read_object(path, max_marks=MOST_MARKS)
    model = data.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, int] = {}
    if isinstance(words, dict):
        ids = words  # checked in place, because there may be many
        for token, number in words.items():
            _check(token, number, path)
    elif isinstance(words, list):
        for number, entry in enumerate(words):
            _put(ids, entry[0] if isinstance(entry, list) and entry else None, number, path)
    else:
        raise bad(path, "has no model.vocab: a kind of tokenizer whose vocabulary cannot be read")
    added: dict[str, Mapping[str, Any]] = {}
    entries = data.get("added_tokens")
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            raise bad(path, "added_tokens: an entry that is not an object")
        _put(ids, entry.get("content"), entry.get("id"), path)
        added[entry["content"]] = entry
    return ids, added


def _read_words(directory: Path) -> tuple[dict[str, int], dict[str, Mapping[str, Any]]] | None:
    if not volumes.lexists(directory / _WORDS):
        return None
    ids = _object(directory / _WORDS)
    for token, number in ids.items():
        _check(token, number, str(directory / _WORDS))
    return ids, {}


def _read_lines(directory: Path) -> tuple[dict[str, int], dict[str, Mapping[str, Any]]] | None:
    path = directory / _LINES
    if not volumes.lexists(path):
        return None
    ids: dict[str, int] = {}
    try:
        lines = _bytes(path).decode().split("\n")
    except UnicodeDecodeError as error:
        raise bad(str(path), f"not UTF-8 (byte {error.start})") from None
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines):
        _put(ids, line.rstrip("\r"), number, str(path))
    return ids, {}


def _read_pieces(directory: Path) -> tuple[dict[str, int], dict[str, Mapping[str, Any]]] | None:
    """Read a sentencepiece model: its pieces (field 1 of the protocol buffer), and their texts (field 1 of a piece)."""
    path = directory / _PIECES
    if not volumes.lexists(path):
        return None
    ids: dict[str, int] = {}
    number = 0
    for key, piece in _fields(memoryview(_bytes(path)), str(path)):
        if key != 1:
            continue
        texts = [bytes(text) for inner, text in _fields(piece, str(path)) if inner == 1]
        try:
            _put(ids, texts[0].decode(), number, str(path))
        except (IndexError, UnicodeDecodeError):
            raise _no_pieces(str(path)) from None
        number += 1
    if not ids:
        raise _no_pieces(str(path))
    return ids, {}


def _fields(data: memoryview, path: str) -> Iterator[tuple[int, memoryview]]:
    """Yield number and content of each length-delimited field of a protocol buffer; skip the other fields."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position, path)
        kind = key & 7
        if kind == 0:
            _, position = _varint(data, position, path)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        elif kind == 2:
            length, position = _varint(data, position, path)
            if length > len(data) - position:
                raise _no_pieces(path)
            yield key >> 3, data[position : position + length]
            position += length
        else:
            raise _no_pieces(path)


def _varint(data: memoryview, position: int, path: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(data):
            raise _no_pieces(path)
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _no_pieces(path)


def _no_pieces(path: str) -> ModelError:
    return bad(path, "not a sentencepiece model: save the tokenizer as tokenizer.json first")


def _bytes(path: Path) -> bytes:
    with reading(str(path)) as (fd, status):
        if status.st_size > MAX_NBYTES:
            raise bad(str(path), f"has {status.st_size} bytes, more than {MAX_NBYTES}")
        return read_exactly(fd, status.st_size, 0, str(path))


def read_chat_template(directory: Path) -> str | None:
    """Return a model's chat template from its own file, else from the settings; if there are several, the default one.

    Raises
    ------
    ModelError
        If a file is malformed.
    """
    path = directory / JINJA
    if volumes.lexists(path):
        try:
            return _bytes(path).decode()
        except UnicodeDecodeError as error:
            raise bad(str(path), f"not UTF-8 (byte {error.start})") from None
    found = _object(directory / SETTINGS).get("chat_template")
    if isinstance(found, list):
        default = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = default[0].get("template") if default else None
    return found if isinstance(found, str) else None
