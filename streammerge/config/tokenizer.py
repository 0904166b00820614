"""The tokenizer section of a config: the vocabulary of the output, and the sources of its tokens' rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Literal

from streammerge.config.references import parse_reference, parse_text
from streammerge.config.wording import check_keys, child, refuse, shown, suggestion
from streammerge.records import dataclass

_MOST_TOKENS = 100_000
_MOST_PADDING = 1 << 20
_SHORTEST_TEMPLATE = 20

TEMPLATES: Mapping[str, str] = {
    "alpaca": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% else %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ '[|endofturn|]\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] + eos_token }}{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
    ),
}
"""Chat templates by name, in Jinja."""


@dataclass(frozen=True)
class TokenSource:
    """The source of one token's row, for models that lack it or, if forced, for all."""

    model: str | None
    """A reference; None: zeros."""
    token: str | int | None = None
    """The token there, by its text or its number; None: the same token."""
    force: bool = False
    path: str = ""
    """Its place in the config, for messages."""


@dataclass(frozen=True)
class TokenizerSpec:
    """The output's vocabulary."""

    source: str
    """``union``, ``base``, or a reference."""
    tokens: Mapping[str, TokenSource] = field(default_factory=dict, hash=False)
    """Tokens with a configured source of their rows; those that the vocabulary lacks are added to it."""
    multiple_of: int = 1
    """The number of rows is a multiple of this."""
    path: str = ""


def parse_tokenizer(data: Mapping[str, object], path: str) -> TokenizerSpec | None:
    """Return what `tokenizer_source` or `tokenizer` of a config says; None if there is neither."""
    short, full = data.get("tokenizer_source"), data.get("tokenizer")
    if short is not None and full is not None:
        refuse(path, "'tokenizer_source' and 'tokenizer' cannot both be set")
    if short is not None:
        place = child(path, "tokenizer_source")
        return TokenizerSpec(_source(short, place), path=place)
    if full is None:
        return None
    place = child(path, "tokenizer")
    if not isinstance(full, dict):
        refuse(place, f"must be a map (source: …), not {shown(full)}")
    check_keys(full, place, ("source", "tokens", "pad_to_multiple_of"))
    source = full.get("source")
    return TokenizerSpec(
        "union" if source is None else _source(source, child(place, "source")),
        _tokens(full.get("tokens"), child(place, "tokens")),
        _multiple(full.get("pad_to_multiple_of"), child(place, "pad_to_multiple_of")),
        place,
    )


def _source(value: object, path: str) -> str:
    return value if value in ("union", "base") and isinstance(value, str) else parse_reference(value, path)


def _multiple(value: object, path: str) -> int:
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_PADDING:
        refuse(path, f"must be an integer from 1 to {_MOST_PADDING}, not {shown(value)}")
    return value


def _tokens(data: object, path: str) -> dict[str, TokenSource]:
    if data is None:
        return {}
    if not isinstance(data, dict):
        refuse(path, f"must be a map (token: {{source: …}}), not {shown(data)}")
    if len(data) > _MOST_TOKENS:
        refuse(path, f"{len(data)} tokens, at most {_MOST_TOKENS}")
    if "" in data:
        refuse(path, "a token without text")
    return {token: _token(value, child(path, token)) for token, value in data.items()}


def _token(data: object, path: str) -> TokenSource:
    if not isinstance(data, dict):
        refuse(path, f"must be a map (source: …), not {shown(data)}")
    check_keys(data, path, ("source", "force"))
    force = data.get("force", False)
    if not isinstance(force, bool | None):
        refuse(child(path, "force"), f"must be true or false, not {shown(force)}")
    source = data.get("source")
    place = child(path, "source")
    if source is None:
        refuse(place, "is missing (a model, {kind: model_token, model: …, token: …}, or {kind: zero})")
    if not isinstance(source, dict) or "kind" not in source:
        return TokenSource(parse_reference(source, place), force=bool(force), path=place)
    return _of_kind(source, place, force=bool(force))


def _of_kind(data: Mapping[str, object], path: str, *, force: bool) -> TokenSource:
    kind = data["kind"]
    if kind == "zero":
        check_keys(data, path, ("kind",))
        return TokenSource(None, force=force, path=path)
    if kind != "model_token":
        refuse(child(path, "kind"), f"{shown(kind)} is none of model_token, zero")
    check_keys(data, path, ("kind", "model", "token", "token_id"))
    if data.get("model") is None:
        refuse(path, "'model' is missing")
    text, number = data.get("token"), data.get("token_id")
    if (text is None) == (number is None):
        refuse(path, "one of 'token' and 'token_id' must be given")
    model = parse_reference(data["model"], child(path, "model"))
    if text is not None:
        if not isinstance(text, str):
            refuse(child(path, "token"), f"must be a string, not {shown(text)} (quote it)")
        return TokenSource(model, text, force, path)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2**31:
        refuse(child(path, "token_id"), f"must be the number of a token, not {shown(number)}")
    return TokenSource(model, number, force, path)


ChatTemplate = Literal["auto"] | str


def parse_chat_template(value: object, path: str) -> ChatTemplate | None:
    """Return ``auto``, or the Jinja text of a template that is named or written out; None if there is none."""
    if value is None:
        return None
    text = parse_text(value, path)
    if text == "auto":
        return text
    if text in TEMPLATES:
        return TEMPLATES[text]
    if "{" not in text or len(text) < _SHORTEST_TEMPLATE:
        refuse(
            path,
            f"{shown(text)} is not a template ({suggestion(text, ['auto', *TEMPLATES])}, or Jinja written out)",
        )
    return text
