"""The YAML reader: what it accepts, and that everything else is one line of ConfigError."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.config.strict_yaml import MAX_BYTES, MAX_COST, MAX_DEPTH, dump_yaml, load_yaml
from streammerge.errors import ConfigError


def _refusal(text: bytes | str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_yaml(text, "c.yml")
    message = str(caught.value)
    assert message.startswith("c.yml: ")
    assert len(message.splitlines()) == 1
    assert len(message) < 500
    assert message.isprintable()
    return message


def _bomb(width: int, levels: int) -> str:
    lines = [f"a0: &a0 [{', '.join(['lol'] * width)}]"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]")
    return "\n".join(lines)


ACCEPTED = [
    (b"\xef\xbb\xbfa: 1", {"a": 1}),  # a BOM
    (b"a: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),  # CRLF
    (b"# c\na: 1 # d\n", {"a": 1}),
    (b"# a tab\tin a comment\na: 1", {"a": 1}),
    (b"---\na: 1\n...\n", {"a": 1}),
    (b"%YAML 1.2\n---\na: 1\n", {"a": 1}),
    ("a: ü😀", {"a": "ü😀"}),
    ("a: 1e-5", {"a": 1e-5}),  # a string in YAML 1.1
    ("a: 1.5e3", {"a": 1500.0}),
    ("a: -.5E-2", {"a": -0.005}),
    ("a: 1.0e+3", {"a": 1000.0}),
    ("a: '1e-5'", {"a": "1e-5"}),
    ("a: 1e", {"a": "1e"}),
    ("a: e5", {"a": "e5"}),
    ("a: 2001-01-01", {"a": "2001-01-01"}),  # no dates
    ("a: 2001-99-99", {"a": "2001-99-99"}),
    ("2001-01-01: a", {"2001-01-01": "a"}),
    ("a: =", {"a": "="}),
    ("a: <<", {"a": "<<"}),
    ("'<<': 1", {"<<": 1}),
    ("a: [yes, no, null, ~]", {"a": [True, False, None, None]}),
    ("a:", {"a": None}),
    ("a: !!str 1\nb: !!float 1\nc: !!seq []", {"a": "1", "b": 1.0, "c": []}),
    ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
    ("a: &x k\n*x : 1", {"a": "k", "k": 1}),  # an alias as a key
    ("a: &x {p: 1, q: 2}\nb:\n  <<: *x\n  q: 3", {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}),
    ("b: {<<: [{p: 1}, {p: 2, q: 2}]}", {"b": {"p": 1, "q": 2}}),  # the first goes before
    ("b: {q: 3, <<: {q: 2}}", {"b": {"q": 3}}),  # wherever it stands
    ("a: .inf", {"a": float("inf")}),  # refused as a value, not as YAML
    ("a: 1e999", {"a": float("inf")}),
    ("a: " + "9" * 300, {"a": int("9" * 300)}),
    ("[" * MAX_DEPTH + "]" * MAX_DEPTH, None),
    ("a: '" + "x" * 100_000 + "'", {"a": "x" * 100_000}),
]


@pytest.mark.parametrize(("text", "value"), ACCEPTED, ids=range(len(ACCEPTED)))
def test_yaml_that_people_write_is_read(text: bytes | str, value: object) -> None:
    read = load_yaml(text, "c.yml")
    if value is not None:
        assert read == value
        assert repr(read) == repr(value)  # 1 is not 1.0, nor true


TWO = "contains a second document, but only one is allowed here"
REFUSED = [
    (b"", "empty"),
    (b"# only a comment\n", "empty"),
    (b"---\n", "empty"),
    (b"null", "empty"),
    (b"a: 1\n---\nb: 2\n", TWO),
    (b"a: 1\na: 2\n", "line 2, column 1: duplicate key 'a'"),
    (b"x: {a: 1, 'a': 2}", "duplicate key 'a'"),
    (b"a: [1\nb: 2", "line 2, column 2: expected ',' or ']'"),
    (b"a: b: c", "mapping values are not allowed"),
    (b"a: 'x", "found unexpected end of stream"),
    (b"a:\n\t- 1", "line 2: tab character (indent and separate with spaces)"),
    (b"a:\t1", "line 1: tab"),
    (b"a: 1\n\xff\xfe", "line 2: not UTF-8"),
    ("a: 1".encode("utf-16"), "line 1: not UTF-8"),
    ("a: 1".encode("utf-16-le"), "line 1: control character '\\x00'"),
    (b"a: 1\nb: \x00", "line 2: control character '\\x00'"),
    (b"a: \x1b[31m", "control character '\\x1b'"),
    ("a: \ud800", "not UTF-8"),  # a lone surrogate in a str
    (b'a: "\\0"', "NUL"),
    (b'a: "\\ud800"', "surrogate"),
    (b'a: "\\U00110000"', "not YAML"),  # ValueError inside PyYAML
    (b"%YAML " + b"9" * 5000 + b".1\n---\na: 1", "line 1: not YAML"),  # another
    (b"%YAML 3.0\n---\na: 1", "incompatible YAML"),
    (b"a: *x", "alias 'x' has no anchor"),
    (b"a: &x [*x]", "alias 'x' contains itself"),
    (b"&x a: &x b", "duplicate anchor 'x'"),
    (b"a: " + b"9" * 5000, "a number of more than 400 characters"),
    (b"a: 0x" + b"f" * 5000, "a number of more than 400 characters"),
    (b"a: 1" + b":59" * 5000, "a number of more than 400 characters"),
    (b"? [a]\n: 1", "a list as a key"),
    (b"? {a: 1}\n: 1", "a map as a key"),
    (b"a: &x [1]\n*x : 1", "key a list is not a string"),
    (b"1: a", "key 1 is not a string (quote it)"),
    (b"on: a", "key true is not a string (quote it)"),
    (b"~: a", "key null is not a string"),
    (b"1e5: a", "key 100000.0 is not a string"),
    (b"<<: 1", "'<<' merges maps, not 1"),
    (b"<<: [a]", "'<<' merges maps, not 'a'"),
    (b"a: &x {p: 1}\nb:\n  <<: *x\n  <<: *x", "line 4, column 3: duplicate key '<<'"),
    (b"a: &x {<<: *x}", "alias 'x' contains itself"),
    (b"!!python/object/apply:os.system ['true']", "is not accepted (remove it)"),
    (b"a: !!python/name:os.system", "is not accepted"),
    (b"a: !!python/object/apply:os.system {args: [x]}", "is not accepted"),
    (b"a: !custom 1", "tag '!custom' is not accepted"),
    (b"a: ! 1", "tag '!' is not accepted"),
    (b"a: !!binary aGk=", "is not accepted"),
    (b"a: !!timestamp 2001-99-99", "is not accepted"),
    (b"a: !!set {x}", "is not accepted"),
    (b"a: !!map [1]", "is not accepted"),
    (b"a: !x!y 1", "undefined tag handle"),
    (b"a: !!int x", "'x' is not a valid int"),
    (b"a: !!bool x", "'x' is not a valid bool"),
    (b"a: !!float ''", "'' is not a valid float"),
    (b"[" * (MAX_DEPTH + 1), "nested deeper than 50 levels"),
    (b"x" * (MAX_BYTES + 1), "larger than 4 MiB"),
    ("ü" * (MAX_BYTES // 2 + 1), "larger than 4 MiB"),
    (b"a: '" + b"x" * 1000 + b"': 1", "line 1, column 1006: "),
    (b"a: [" + b"1," * MAX_COST + b"]", "more than 100000 values"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED, ids=range(len(REFUSED)))
def test_all_else_is_refused_in_one_line(text: bytes | str, words: str) -> None:
    assert words in _refusal(text)


HUGE = [
    _bomb(10, 9),  # billion laughs
    "merge_method: linear\nmodels:\n  - model: a\n    parameters:\n      weight: &a0 [1, 1]\n"
    + "".join(f"x{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)),
    "a0: &a0 {p: 1}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 40)),
    f"a: &a '{'x' * 1_000_000}'\nb: [{', '.join(['*a'] * 90_000)}]",  # one long string, many times
    "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40)),
    "[" * 50_000,
    "[" * 50_000 + "]" * 50_000,
    "a: " + "{a: " * 50_000,
    "- " * 50_000,
    "? " * 50_000,
    "\n".join(" " * i + "a:" for i in range(2000)),
    "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200)),  # deep by aliases
    "!" * 1_000_000,
    "&" * 1_000_000,
    "a: " + "1_" * 500_000,
]


@pytest.mark.parametrize("text", HUGE, ids=range(len(HUGE)))
def test_hostile_sizes_are_refused(text: str) -> None:
    """In time proportional to the size: else it takes hours."""
    _refusal(text)


def test_aliases_are_counted_as_if_written_out() -> None:
    assert load_yaml("[&a [1, 1, 1], " + ", ".join(["*a"] * 24_000) + "]", "c")
    assert "aliases expanded" in _refusal("[&a [1, 1, 1], " + ", ".join(["*a"] * 25_000) + "]")


_ALPHABET = "ab01.-+eE:,[]{}&*!|>'\"%@`#?<= \n\t~_\\x\r\ufeff"


@settings(max_examples=600, deadline=None)
@given(st.one_of(st.text(_ALPHABET, max_size=60), st.text(max_size=40), st.binary(max_size=60)))
def test_whatever_comes_in_only_config_error_comes_out(text: str | bytes) -> None:
    try:
        load_yaml(text, "c.yml")
    except ConfigError:
        _refusal(text)


_SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**64), 2**64), st.floats(allow_nan=False), st.text(max_size=20)
)
_PRINTABLE = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
_TREES = st.recursive(
    _SCALARS, lambda t: st.lists(t, max_size=4) | st.dictionaries(_PRINTABLE, t, max_size=4), max_leaves=12
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(_PRINTABLE, _TREES, min_size=1, max_size=4))
def test_what_is_dumped_reads_back_equal(tree: dict[str, object]) -> None:
    if "\\0" not in dump_yaml(tree):  # NUL is refused
        assert load_yaml(dump_yaml(tree), "c") == tree


@pytest.mark.parametrize("text", ["1e-5", "2001-01-01", "1:30", "yes", "0x1f", "=", "<<", "~", "1_0", ""])
def test_dumped_strings_stay_strings_for_any_reader(text: str) -> None:
    assert load_yaml(dump_yaml({"a": text}), "c") == {"a": text}
    assert yaml.safe_load(dump_yaml({"a": text})) == {"a": text}


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(_PRINTABLE, _TREES, min_size=1, max_size=4))
def test_it_reads_what_pyyaml_reads(tree: dict[str, object]) -> None:
    text = yaml.safe_dump(tree)
    assume_same = "e" not in text.lower() and "\\0" not in text  # 1e5, NUL: where we differ on purpose
    if assume_same:
        assert load_yaml(text, "c") == yaml.safe_load(text)
