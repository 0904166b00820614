"""Strict YAML for configs: documents, string keys, no surprises, bounded work.

PyYAML's pure Python scanner reads the text, so that every machine accepts the same text, with or without libyaml. Values
are built from the stream of events instead of by PyYAML's constructors: every limit is checked before anything is
built, without recursion, and aliases count as if they were written out.
"""

from __future__ import annotations

from typing import Any, NoReturn

import yaml
from yaml.constructor import ConstructorError
from yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentEndEvent,
    MappingStartEvent,
    ScalarEvent,
    StreamEndEvent,
)
from yaml.reader import Reader

from streammerge.config.wording import refuse, shown
from streammerge.config.yaml_errors import explain
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

MAX_BYTES = 4 << 20
"""Size of the longest text that is read, in bytes."""

MAX_DEPTH = 50
"""Most nested collections, aliases expanded."""

MAX_COST = 100_000
"""Most nodes of a document, aliases expanded; 100 characters of text count as one more node."""

_NUMBER_LENGTH = 400
"""Most characters of a number; a float holds integers of 309 digits."""

_TAG = "tag:yaml.org,2002:"
_STR, _MERGE = _TAG + "str", _TAG + "merge"
_NUMBERS = frozenset({_TAG + "int", _TAG + "float"})
_SPELLED = _NUMBERS | {_TAG + "bool"}
"""Scalars that can be spelled in several ways."""
_SCALARS = frozenset({_STR, _MERGE, _TAG + "null", _TAG + "bool"}) | _NUMBERS

_EXPONENT = late_pattern(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+\Z")
"""Floats that YAML 1.1 treats as strings because the dot or sign is missing: 1e-5, 1.5e3."""

UNSPEAKABLE = late_pattern("[\0\ud800-\udfff]")
"""Characters that names must not contain: NUL, and surrogates, which UTF-8 cannot encode."""

_Anchored = tuple[object, int, int]
"""A finished value, its cost and its height."""


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner, parser and scalar types; dates and `=` stay strings, 1e-5 is a float."""


class _Dumper(yaml.SafeDumper):
    """Quotes strings that `_Loader` (or PyYAML's loader) would not read back as strings."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in pairs if tag in _SCALARS]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_TAG + "float", _EXPONENT, list("-+.0123456789"))


def load_yaml(text: bytes | str, where: str) -> object:
    """Return the one document of `text` as dicts with string keys, lists and scalars.

    Raises ConfigError as `load_documents` does, and for a second document.
    """
    documents = load_documents(text, where)
    if len(documents) > 1:
        refuse(where, "contains a second document, but only one is allowed here")
    return documents[0]


def load_documents(text: bytes | str, where: str, *, verbatim: bool = False) -> list[object]:
    """Return the documents of `text`, at least one, as dicts with string keys, lists and scalars, without empty ones.

    With `verbatim`, numbers and booleans are the text that spells them.

    Raises ConfigError, one line beginning with `where`, for anything else: syntax errors, bytes
    that are not UTF-8, duplicate keys, tags, aliases that recur or explode.
    """
    decoded = _decode(text, where)
    loader = _Loader(decoded)
    try:
        return _Builder(loader, verbatim).documents()
    except yaml.MarkedYAMLError as error:
        refuse(where, explain(error, decoded, loader.line))
    except (ValueError, RecursionError, OverflowError) as error:
        # Numbers in directives and escapes: PyYAML converts them unchecked.
        refuse(where, f"line {loader.line + 1}: not YAML ({str(error)[:100]})")


def dump_yaml(data: object) -> str:
    """Return `data`, plain dicts, lists and scalars, as YAML that `load_yaml` reads back equal.

    The text is ASCII, since Unicode line breaks would be read back as blanks.
    """
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False))


def _decode(text: bytes | str, where: str) -> str:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)
    if len(data) > MAX_BYTES:
        refuse(where, f"larger than {MAX_BYTES >> 20} MiB (is this the right file?)")
    try:
        decoded = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        refuse(where, f"line {line}: not UTF-8 (save it as UTF-8)")
    bad = Reader.NON_PRINTABLE.search(decoded)
    if bad is not None:
        line = decoded.count("\n", 0, bad.start()) + 1
        refuse(where, f"line {line}: control character {bad.group()!r} (remove it)")
    return decoded


def _fail(event: Any, problem: str) -> NoReturn:
    raise ConstructorError(None, None, problem, event.start_mark)


@dataclass
class _Open:
    """A collection that is not complete yet."""

    value: list[object] | dict[str, object]
    anchor: str | None
    cost_before: int
    height: int = 1
    """Levels of collections below and including this one, so far."""
    key: str | None = None
    """A mapping's key that waits for its value."""
    merging: bool = False
    """The key that waits is the merge key `<<`."""
    merged: dict[str, object] | None = None
    """The entries that `<<` merges in; keys that are written out override them."""


class _Builder:
    """Builds the values of documents from their events; `stack` holds the open collections."""

    def __init__(self, loader: Any, verbatim: bool = False) -> None:
        self.loader, self._as_text = loader, _SPELLED if verbatim else frozenset()
        self.cost = 0

    def documents(self) -> list[object]:
        self._next()  # the start of the stream
        found: list[object] = []
        while not isinstance(event := self._next(), StreamEndEvent):
            self.root: list[object] = []
            self.stack = [_Open(self.root, None, 0)]
            self.anchors: dict[str, _Anchored | None] = {}  # None: still open
            while not isinstance(event := self._next(), DocumentEndEvent):
                self._take(event)
            if self.root[0] is not None:
                found.append(self.root[0])
        if not found:
            _fail(event, "the config is empty")
        return found

    def _next(self) -> Any:
        return self.loader.get_event()

    def _take(self, event: Any) -> None:
        if isinstance(event, AliasEvent):
            self._alias(event)
        elif isinstance(event, ScalarEvent):
            self._scalar(event)
        elif isinstance(event, CollectionStartEvent):
            self._open(event)
        else:
            self._close(event)

    def _pay(self, event: Any, cost: int) -> None:
        self.cost += cost
        if self.cost > MAX_COST:
            _fail(event, f"more than {MAX_COST} values, aliases expanded (write a smaller config)")

    def _scalar(self, event: Any) -> None:
        cost = 1 + len(event.value) // 100
        self._pay(event, cost)
        tag = event.tag
        if tag is None:
            tag = self.loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        if tag not in _SCALARS:
            _fail(event, f"tag {shown(tag)} is not accepted (remove it)")
        value: object = event.value
        if UNSPEAKABLE.search(event.value):
            _fail(event, "NUL or half a surrogate pair in a string (remove the escape)")
        if tag in _NUMBERS and len(event.value) > _NUMBER_LENGTH:
            _fail(event, f"a number of more than {_NUMBER_LENGTH} characters (quote a string)")
        if tag not in (_STR, _MERGE) and tag not in self._as_text:
            node = yaml.ScalarNode(tag, event.value)
            try:
                value = self.loader.construct_object(node)
            except (ValueError, KeyError, IndexError, OverflowError):
                _fail(event, f"{shown(event.value)} is not a valid {tag.removeprefix(_TAG)}")
        frame = self.stack[-1]
        if tag == _MERGE and isinstance(frame.value, dict) and not self._wants_value(frame):
            if frame.merged is not None:
                _fail(event, "duplicate key '<<' (merge a list: '<<: [*a, *b]')")
            frame.merging = True
            return
        self._name(event, (value, cost, 0))
        self._place(event, value, 0)

    def _alias(self, event: Any) -> None:
        if event.anchor not in self.anchors:
            _fail(event, f"alias {shown(event.anchor)} has no anchor before it")
        anchored = self.anchors[event.anchor]
        if anchored is None:
            _fail(event, f"alias {shown(event.anchor)} contains itself")
        value, cost, height = anchored
        self._pay(event, cost)
        if len(self.stack) - 1 + height > MAX_DEPTH:
            _fail(event, f"nested deeper than {MAX_DEPTH} levels")
        self._place(event, value, height)

    def _open(self, event: Any) -> None:
        is_map = isinstance(event, MappingStartEvent)
        self._pay(event, 1)
        if event.tag not in (None, _TAG + ("map" if is_map else "seq")):
            _fail(event, f"tag {shown(event.tag)} is not accepted (remove it)")
        if len(self.stack) > MAX_DEPTH:
            _fail(event, f"nested deeper than {MAX_DEPTH} levels")
        frame = self.stack[-1]
        if isinstance(frame.value, dict) and not self._wants_value(frame):
            _fail(event, f"{'a map' if is_map else 'a list'} as a key (a key is a string)")
        self._name(event, None)
        self.stack.append(_Open({} if is_map else [], event.anchor, self.cost - 1))

    def _close(self, event: Any) -> None:
        frame = self.stack.pop()
        if frame.merged is not None and isinstance(frame.value, dict):
            frame.value = {**frame.merged, **frame.value}
        if frame.anchor is not None:
            self.anchors[frame.anchor] = (frame.value, self.cost - frame.cost_before, frame.height)
        self._place(event, frame.value, frame.height)

    def _name(self, event: Any, anchored: _Anchored | None) -> None:
        if event.anchor is None:
            return
        if event.anchor in self.anchors:
            _fail(event, f"duplicate anchor {shown(event.anchor)} (rename one)")
        self.anchors[event.anchor] = anchored

    @staticmethod
    def _wants_value(frame: _Open) -> bool:
        return frame.key is not None or frame.merging

    def _place(self, event: Any, value: object, height: int) -> None:
        frame = self.stack[-1]
        frame.height = max(frame.height, height + 1)
        if isinstance(frame.value, list):
            frame.value.append(value)
        elif frame.merging:
            frame.merged, frame.merging = self._merge(event, value), False
        elif frame.key is not None:
            frame.value[frame.key], frame.key = value, None
        elif not isinstance(value, str):
            _fail(event, f"key {shown(value)} is not a string (quote it)")
        elif value in frame.value:
            _fail(event, f"duplicate key {shown(value)} (remove one)")
        else:
            frame.key = value

    @staticmethod
    def _merge(event: Any, value: object) -> dict[str, object]:
        merged: dict[str, object] = {}
        for source in value if isinstance(value, list) else [value]:
            if not isinstance(source, dict):
                _fail(event, f"'<<' merges maps, not {shown(source)}")
            for key, item in source.items():
                merged.setdefault(key, item)
        return merged
