"""The tokenizer files of an output: one model's files, plus the tokens and the chat template that the merge adds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.tokenizer import (
    ADDED,
    FULL,
    JINJA,
    MOST_MARKS,
    SETTINGS,
    read_chat_template,
    read_tokenizer,
)
from streammerge.config.schema import MergeConfig
from streammerge.errors import printable
from streammerge.io import volumes
from streammerge.io.strict_json import read_object
from streammerge.planning.resolve.row_maps import Ids
from streammerge.planning.resolve.vocabulary import Alignment, NewToken
from streammerge.records import dataclass

GENERATION = "generation_config.json"
_PROCESSOR = "chat_template.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""Properties of an added token in a tokenizer's files."""
_NUMBERS = ("_token_id", "_token_ids", "_token_index")
"""Endings of the names of settings that are token ids."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files of the output."""

    directory: Path
    changed: Mapping[str, bytes]
    """Files that differ from those in the directory, by name."""
    notes: tuple[str, ...] = ()


def tokenizer_files(
    config: MergeConfig,
    template: TensorIndex,
    indexes: Mapping[str, TensorIndex],
    alignment: Alignment | None,
) -> TokenizerFiles:
    """Return the tokenizer files of a merge.

    Raises
    ------
    ModelError
        If a file that must be changed is malformed.
    """
    directory = template.directory if alignment is None else alignment.directory
    objects: dict[str, dict[str, Any]] = {}
    texts: dict[str, str] = {}
    notes: list[str] = []
    if alignment is not None and alignment.new:
        objects |= _with_tokens(directory, alignment.new)
    if config.chat_template is not None:
        chat = config.chat_template if config.chat_template != "auto" else _most_common(indexes)
        if chat is None:
            notes.append("chat_template: auto: no model has one")
        else:
            _set_template(directory, chat, objects, texts)
    if (
        alignment is not None
        and alignment.numbers is not None
        and volumes.lexists(template.directory / GENERATION)
    ):
        settings = read_object(str(template.directory / GENERATION))
        if lost := renumber(settings, alignment.numbers):
            notes.append(
                f"{GENERATION}: {', '.join(lost)}: the output's tokenizer lacks this token: set it by hand"
            )
        objects[GENERATION] = settings
    changed = {name: _spelled(value) for name, value in objects.items()}
    objects.clear()
    return TokenizerFiles(
        directory, changed | {name: text.encode() for name, text in texts.items()}, tuple(notes)
    )


def _spelled(value: Mapping[str, Any]) -> bytes:
    """Return a file as JSON: indented, except a whole tokenizer, for which that would take half a minute and a gigabyte."""
    indent = None if "added_tokens" in value else 2
    return json.dumps(value, indent=indent, ensure_ascii=False).encode() + b"\n"


def _with_tokens(directory: Path, new: tuple[NewToken, ...]) -> dict[str, dict[str, Any]]:
    """Return the files that list added tokens, with the new tokens and with tokens that only some files listed so far.

    Otherwise a loader that reads only one of the files would number the tokens after the missing ones differently.
    """
    source = read_tokenizer(directory)
    assert source is not None
    entries = {token.number: _entry(token.text, token.about) for token in new}
    found: dict[str, dict[str, Any]] = {}
    full = volumes.lexists(directory / FULL)
    if full:
        data = read_object(str(directory / FULL), max_marks=MOST_MARKS)
        before = data.get("added_tokens")
        listed = before if isinstance(before, list) else []
        words = data["model"]["vocab"]
        known = {entry["content"] for entry in listed}
        known |= set(words) if isinstance(words, dict) else {word[0] for word in words}
        lost = {
            number: _entry(text, source.added.get(text, {}))
            for text, number in source.ids.items()
            if text not in known
        }
        data["added_tokens"] = [
            *listed,
            *({"id": number, **entry} for number, entry in sorted((lost | entries).items())),
        ]
        found[FULL] = data
    if not full or volumes.lexists(directory / ADDED):
        data = read_object(str(directory / ADDED)) if volumes.lexists(directory / ADDED) else {}
        found[ADDED] = data | {token.text: token.number for token in new}
    if volumes.lexists(directory / SETTINGS):
        data = read_object(str(directory / SETTINGS))
        decoder = data.get("added_tokens_decoder")
        if isinstance(decoder, dict) or not full:
            kept: dict[str, Any] = dict(decoder) if isinstance(decoder, dict) else {}
            added = read_object(str(directory / ADDED)) if volumes.lexists(directory / ADDED) else {}
            lost = {
                number: _entry(text, source.added.get(text, {}))
                for text, number in added.items()
                if str(number) not in kept
            }
            kept |= {str(number): entry for number, entry in sorted((lost | entries).items())}
            found[SETTINGS] = {**data, "added_tokens_decoder": kept}
    return found


def _entry(text: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of an added token, as in the tokenizer's own files or in those the token comes from."""
    return {"content": text} | {
        flag: about[flag] if isinstance(about.get(flag), bool) else False for flag in _FLAGS
    }


def _most_common(indexes: Mapping[str, TensorIndex]) -> str | None:
    """Return the most common chat template of the models; of equally common ones the first."""
    templates = [read_chat_template(index.directory) for index in indexes.values()]
    counts = Counter(template for template in templates if template is not None)
    return max(counts, key=lambda template: counts[template]) if counts else None


def _set_template(
    directory: Path, template: str, objects: dict[str, dict[str, Any]], texts: dict[str, str]
) -> None:
    """Write a chat template to every place where loaders look for one."""
    settings = volumes.lexists(directory / SETTINGS)
    if settings:
        data = objects.get(SETTINGS) or read_object(str(directory / SETTINGS))
        objects[SETTINGS] = {**data, "chat_template": template}
    if not settings or volumes.lexists(directory / JINJA):
        texts[JINJA] = template
    if volumes.lexists(directory / _PROCESSOR):
        objects[_PROCESSOR] = {"chat_template": template}


def renumber(settings: dict[str, Any], numbers: Ids) -> list[str]:
    """Replace the template model's token ids by the output's; return the settings whose token the output lacks."""
    lost = []
    for key, value in settings.items():
        if not key.endswith(_NUMBERS):
            continue
        values = value if isinstance(value, list) else [value]
        if not all(type(item) is int and 0 <= item < len(numbers) for item in values):
            continue
        new = [int(numbers[item]) for item in values]
        if min(new, default=0) < 0:
            lost.append(printable(key, 60))
        else:
            settings[key] = new if isinstance(value, list) else new[0]
    return lost
