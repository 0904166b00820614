"""Headers with random edits: what is accepted is what the reference accepts, or less."""

import contextlib

import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.checkpoint import read_header
from streammerge.errors import ModelError
from tests.formats.safetensors_files import BITS, sound

# Laws.


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


SHAPES = st.lists(st.integers(0, 4), max_size=5).map(tuple)


TENSORS = st.dictionaries(
    NAMES.filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(BITS)), SHAPES).map(
        # The narrow dtypes must fill whole bytes: four elements always do.
        lambda t: (t[0], (*t[1], 4)) if BITS[t[0]] < 8 else t
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(TENSORS, st.none() | st.dictionaries(NAMES, NAMES, max_size=3), st.booleans())
def test_whatever_is_written_by_the_rules_is_read_back(shared_path, tensors, metadata, pad):
    raw = sound(tensors, metadata, pad)
    rewrite(shared_path, raw)
    found, found_metadata, _ = read_header(shared_path)
    assert {name: (ref.dtype, ref.shape) for name, ref in found.items()} == tensors
    assert found_metadata == (metadata or {})
    assert (
        b"".join(raw[r.offset : r.offset + r.nbytes] for r in found.values())
        == raw[len(raw) - sum(r.nbytes for r in found.values()) :]
    )


FUZZED = sound({"w.a": ("BF16", (2, 3)), "w.é": ("F4", (4,)), "s": ("F32", ())}, {"k": "v"})


def assert_never_laxer_than_the_reference(path, raw):
    """Parsed or refused, never another exception; and what the reference refuses, we refuse."""
    rewrite(path, raw)
    with contextlib.suppress(ModelError):
        read_header(path)
        safetensors.deserialize(raw)


def rewrite(path, raw):
    """Write in place: some file systems flush a file that is truncated first, thousands of times."""
    path.touch()
    with open(path, "r+b") as file:
        file.write(raw)
        file.truncate()


def test_every_single_bit_flip_is_parsed_or_refused(shared_path):
    for bit in range(8 * len(FUZZED)):
        raw = bytearray(FUZZED)
        raw[bit // 8] ^= 1 << bit % 8
        assert_never_laxer_than_the_reference(shared_path, bytes(raw))


EDITS = st.lists(
    st.tuples(st.integers(0, len(FUZZED)), st.integers(0, 6), st.binary(max_size=6)),
    min_size=1,
    max_size=4,
)


JSON_EDITS = st.lists(
    st.tuples(
        st.integers(8, len(FUZZED)),
        st.integers(0, 3),
        st.text('[]{},:"\\u0189-eE. \ttrufalsn', max_size=4).map(str.encode),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=500, deadline=None)
@given(EDITS | JSON_EDITS, st.booleans())
def test_every_mutilation_is_parsed_or_refused(shared_path, edits, mend_length):
    raw = FUZZED
    for at, drop, insert in edits:
        raw = raw[:at] + insert + raw[at + drop :]
    if mend_length and len(raw) > 8:  # So that the mutilation reaches the parser.
        raw = (max(0, len(raw) - 8 - 18)).to_bytes(8, "little") + raw[8:]
    assert_never_laxer_than_the_reference(shared_path, raw)


@pytest.fixture(scope="module")
def shared_path(tmp_path_factory):
    """A path that Hypothesis may write again and again."""
    return tmp_path_factory.mktemp("header") / "m.safetensors"
