"""Headers: sound ones agree with the safetensors library, hostile ones are refused in one line."""

import contextlib
import errno
import hashlib
import json
import os
import socket

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge import dtypes
from streammerge.checkpoint import read_header
from streammerge.errors import ModelError, WorldError
from streammerge.io.files import from_os
from tests.formats.safetensors_files import BITS, entry, framed, sound, within

E = json.dumps(entry())
GOOD = framed({"a": entry()})


def one(**fields):
    """Return a file of one F32 tensor with some fields of its entry replaced (None: left out)."""
    fields = {**entry(), **fields}
    return framed({"a": {key: value for key, value in fields.items() if value is not ...}})


def text(template):
    """Return a file whose header is `template`, each ENTRY in it that of one F32 tensor."""
    return framed(template.replace("ENTRY", E))


def raw_entry(text):
    return framed('{"a":' + text + "}")


def shaped(shape, dtype="F32", nbytes=4):
    fields = f'"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{nbytes}]'
    return framed('{"a":{' + fields + "}}", bytes(nbytes))


def two(a, b, nbytes=8):
    """Return a file of two tensors of one byte element with the given byte ranges."""
    a, b = (entry("U8", (end - begin,), begin, end) for begin, end in (a, b))
    return framed({"a": a, "b": b}, bytes(nbytes))


NESTED = 200_000

# (what is wrong, the file, a part of the message)
HOSTILE = [
    # File and length.
    ("empty", b"", "empty file"),
    ("seven bytes", b"\x02\0\0\0\0\0\0", "7 bytes"),
    ("only a length", framed(b"", b"", 2), "beyond the end"),
    ("zeros", bytes(64), "not a JSON object"),
    ("a login page", b"<!DOCTYPE html><html>Sign in</html>", "web page"),
    ("a git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    ("a renamed zip", b"PK\x03\x04\0\0\x08\x08" + bytes(64), "rename it"),
    ("a renamed pickle", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "rename it"),
    ("a GGUF file", b"GGUF\x03\0\0\0" + bytes(64), "GGUF"),
    ("length 0", framed(b"", b"\0" * 8), "not a JSON object"),
    ("length beyond the file", framed({"a": entry()}, length=10_000), "beyond the end"),
    ("length one too long", framed({"a": entry()}, b"", len(GOOD) - 11), "beyond"),
    ("length one too short", framed({"a": entry()}, length=len(GOOD) - 13), "not JSON"),
    ("length 2^63", framed({"a": entry()}, length=2**63), str(2**63)),
    ("length 2^64-1", framed({"a": entry()}, length=2**64 - 1), str(2**64 - 1)),
    ("length that wraps to 0 with the 8 before it", framed({"a": entry()}, length=2**64 - 8), "18"),
    ("length above the limit", framed({"a": entry()}, length=100_000_001), "100000001"),
    # Text.
    ("not UTF-8", framed(b'{"\xff":' + E.encode() + b"}"), "not UTF-8"),
    ("a surrogate in UTF-8", framed(b'{"\xed\xa0\x80":' + E.encode() + b"}"), "not UTF-8"),
    ("UTF-16", framed(json.dumps({"a": entry()}).encode("utf-16-le")), "not JSON"),
    ("a byte order mark", framed(b"\xef\xbb\xbf" + json.dumps({"a": entry()}).encode()), "JSON"),
    ("an array", text("[ENTRY]"), "not a JSON object"),
    ("null", framed("null"), "not a JSON object"),
    ("JSON cut short", framed('{"a":' + E), "not JSON"),
    ("garbage after the object", text('{"a":ENTRY}x'), "not JSON"),
    ("NUL bytes after the object", text('{"a":ENTRY}\0\0'), "not JSON"),
    ("a leading blank", text(' {"a":ENTRY}'), "not a JSON object"),  # The specification: MUST.
    ("single quotes", framed("{'a':1}"), "not JSON"),
    ("a raw newline in a name", text('{"a\n":ENTRY}'), "not JSON"),
    ("nested arrays", framed('{"a":' + "[" * NESTED), "nested too deeply"),
    ("nested objects", framed('{"a":' * NESTED), "nested too deeply"),
    ("nested metadata", framed('{"__metadata__":' + '{"a":' * NESTED), "nested too deeply"),
    ("a duplicate tensor", text('{"a":ENTRY,"a":ENTRY}'), "'a' twice"),
    ("a duplicate by escape", text('{"a":ENTRY,"\\u0061":ENTRY}'), "'a' twice"),
    ("duplicate metadata", text('{"__metadata__":{},"__metadata__":{},"a":ENTRY}'), "twice"),
    ("a duplicate field", raw_entry(E[:-1] + ',"dtype":"F32"}'), "'dtype' twice"),
    ("a million empty lists", framed('{"a":[' + "[]," * 2_600_000 + "[]]}"), "brackets"),
    # Numbers, as sizes and as offsets.
    ("NaN", shaped("[NaN]"), "NaN"),
    ("Infinity", shaped("[Infinity]"), "Infinity"),
    ("1e999", shaped("[1e999]"), "1e999"),
    ("a float", shaped("[1.0]"), "1.0"),
    ("an exponent", shaped("[1e0]"), "1e0"),
    ("a boolean", shaped("[true]"), "whole numbers"),  # True == 1 to Python.
    ("a string", shaped('["1"]'), "whole numbers"),
    ("a negative size", shaped("[-1]"), "negative"),
    ("two negative sizes", shaped("[-1,-1]"), "negative"),  # Their product is right.
    ("minus zero", shaped("[-0]", nbytes=0), "negative"),
    ("5000 digits", shaped("[" + "9" * 5000 + "]"), "5000 digits"),
    ("a null size", shaped("[null]"), "whole numbers"),
    ("a list as a size", shaped("[[1]]"), "whole numbers"),
    ("a shape that is a number", shaped("1"), "whole numbers"),
    ("a shape that is null", shaped("null"), "whole numbers"),
    ("boolean offsets", raw_entry(E.replace("[0, 4]", "[false,4]")), "two whole numbers"),
    ("float offsets", raw_entry(E.replace("[0, 4]", "[0,4.0]")), "4.0"),
    ("string offsets", raw_entry(E.replace("[0, 4]", '["0","4"]')), "two whole numbers"),
    ("negative offsets", raw_entry(E.replace("[0, 4]", "[-4,0]")), "negative"),
    ("offsets of 5000 digits", raw_entry(E.replace("4]", "4" * 5000 + "]")), "5000 digits"),
    # Fields.
    ("no dtype", one(dtype=...), "no dtype"),
    ("no shape", one(shape=...), "no shape"),
    ("no offsets", one(data_offsets=...), "no data_offsets"),
    ("null dtype", one(dtype=None), "dtype is not a string"),
    ("unhashable dtype", one(dtype=["F32"]), "dtype is not a string"),
    ("unknown dtype", one(dtype="F31"), "unknown dtype 'F31'"),
    ("lower-case dtype", one(dtype="f32"), "unknown dtype 'f32'"),
    ("an unknown field", one(strides=[1]), "unknown field 'strides'"),  # May change the meaning.
    ("an entry that is a list", framed({"a": []}), "not an object"),
    ("an entry that is null", framed({"a": None}), "not an object"),
    ("null offsets", one(data_offsets=None), "two whole numbers"),
    ("one offset", one(data_offsets=[4]), "two whole numbers"),
    ("three offsets", one(data_offsets=[0, 4, 4]), "two whole numbers"),
    # Shapes against bytes.
    ("a product beyond 64 bits", shaped([2**63, 2**63]), "not those of F32"),
    ("a product that wraps to 0", shaped([2**32, 2**32], nbytes=0), "not those"),
    ("a product that wraps to the right size", shaped([2**63 + 1, 2]), "not those"),
    ("bits that wrap to the right size", shaped([2**59 + 1]), "not those"),
    ("huge sizes beside a zero", shaped([2**40, 2**40, 0], nbytes=0), "not those"),
    ("100 000 dimensions", shaped([1] * 100_000), "100000 dimensions"),
    ("65 dimensions", shaped([1] * 65), "65 dimensions"),
    ("too few bytes for the shape", shaped("[2]"), "its 4 bytes"),
    ("too many bytes for the shape", shaped("[1]", nbytes=8), "its 8 bytes"),
    ("no bytes for a scalar", shaped("[]", nbytes=0), "its 0 bytes"),
    ("bytes for an empty tensor", shaped("[0]"), "its 4 bytes"),
    ("half a byte of F4", shaped("[3]", "F4", 1), "not those of F4"),
    ("half a byte of F4, rounded up", shaped("[3]", "F4", 2), "not those of F4"),
    ("six bits of F6", shaped("[1]", "F6_E2M3", 1), "not those of F6_E2M3"),
    # Offsets against each other and against the file.
    ("reversed offsets", one(data_offsets=[4, 0]), "reversed"),
    ("offsets beyond the file", framed({"a": entry("U8", (99,), 0, 99)}), "truncated"),
    ("offsets of 2^64", framed({"a": entry("U8", (2**64,), 0, 2**64)}), "truncated"),
    ("two tensors on one range", two((0, 8), (0, 8)), "'a' and 'b' overlap"),
    ("an overlap by 4", two((0, 6), (2, 8)), "'a' and 'b' overlap"),
    ("one tensor within another", two((0, 8), (2, 4)), "overlap"),
    ("an empty tensor within another", two((0, 8), (4, 4)), "overlap"),
    ("a hole", two((0, 2), (4, 8)), "2 bytes before tensor 'b'"),
    ("a gap at the start", two((2, 4), (4, 8)), "2 bytes before tensor 'a'"),
    ("trailing bytes", GOOD + b"PK\x03\x04", "4 bytes follow"),  # A file that is two at once.
    ("one byte short", GOOD[:-1], "truncated"),
    ("half of the data gone", two((0, 4), (4, 8), nbytes=4), "truncated"),
    ("no data", framed({"a": entry()}, b""), "truncated"),
    # Metadata and names.
    ("metadata that is a list", framed({"__metadata__": [], "a": entry()}), "map of strings"),
    ("metadata that is null", framed({"__metadata__": None, "a": entry()}), "map of strings"),
    ("metadata with a number", framed({"__metadata__": {"n": 1}, "a": entry()}), "'n' is not a"),
    ("metadata with a map", framed({"__metadata__": {"n": {}}, "a": entry()}), "'n' is not a"),
    ("no tensors", framed("{}", b""), "no tensors"),
    ("metadata but no tensors", framed({"__metadata__": {"a": "b"}}, b""), "no tensors"),
    ("data but no tensors", framed("{}", b"\0\0\0\0"), "no tensors"),
    ("an empty name", framed({"": entry()}), "empty name"),
    ("a name of 10 000 characters", framed({"n" * 10_000: entry()}), "10000 characters"),
    ("a lone surrogate as a name", text('{"\\ud800":ENTRY}'), "surrogate"),
    ("a lone surrogate as a dtype", one(dtype="\udc00"), "surrogate"),
    ("a lone surrogate in metadata", framed({"__metadata__": {"a": "\ud800"}}), "surrogate"),
    ("a terminal escape as a name", framed({"\x1b[31m\n": {}}), "'\\x1b[31m\\n'"),
    ("a name that reverses the line", framed({"\u202egnp.exe": {}}), "\\u202e"),
]

REFERENCE_ACCEPTS = {
    "no tensors",
    "metadata but no tensors",
    "a duplicate tensor",
    "a duplicate by escape",
    "a leading blank",
    "an unknown field",
    "an empty name",
    "a name of 10 000 characters",
    "metadata that is null",
    "65 dimensions",
    "100 000 dimensions",
}
"""Files that the safetensors library accepts and we refuse; see the docstring of formats/safetensors.py."""


def by_name(rows):
    return [pytest.param(*row, id=row[0].replace(" ", "-")) for row in rows]


@pytest.fixture
def write(tmp_path):
    def write(raw):
        path = tmp_path / "model.safetensors"
        path.write_bytes(raw)
        return path

    return write


@pytest.mark.parametrize(("what", "raw", "message"), by_name(HOSTILE))
def test_a_hostile_file_is_refused_in_one_line_that_names_it(what, raw, message, write):
    path = write(raw)
    with within(20), pytest.raises(ModelError) as caught:
        read_header(path)
    line = str(caught.value)
    assert message in line
    assert "model.safetensors: " in line
    assert line.isprintable()
    assert len(line) < 1000


@pytest.mark.parametrize(("what", "raw", "message"), by_name(r for r in HOSTILE if len(r[1]) < 10_000))
def test_the_table_says_where_we_are_stricter_than_the_reference(what, raw, message):
    try:
        safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        assert what not in REFERENCE_ACCEPTS
    else:
        assert what in REFERENCE_ACCEPTS


ACCEPTED = [
    ("trailing blanks", text('{"a":ENTRY} \t\r\n ')),
    ("an unaligned header", text('{"abc":ENTRY}  ')),
    ("pretty-printed", framed(json.dumps({"a": entry()}, indent=4))),
    ("another order of keys", framed({"a": dict(reversed(entry().items()))})),
    ("no metadata", GOOD),
    ("empty metadata", framed({"__metadata__": {}, "a": entry()})),
    ("metadata last", framed({"a": entry(), "__metadata__": {"format": "pt"}})),
    ("tensors not in the order of their bytes", two((4, 8), (0, 4))),
    ("a scalar", framed({"a": entry(shape=())})),
    ("five dimensions of one", framed({"a": entry(shape=(1, 1, 1, 1, 1))})),
    ("a zero size", framed({"a": entry(shape=(3, 0, 2), end=0)}, b"")),
    ("empty tensors at both ends", framed({
        "end": entry(shape=(0,), begin=4), "a": entry(), "begin": entry(shape=(0,), end=0)})),
    ("a big size beside a zero", framed({"a": entry(shape=(0, 4096, 10**9), end=0)}, b"")),
    ("unicode", framed({"模型.重み.😀": entry()})),
    ("unicode, escaped as a pair", text('{"\\ud83d\\ude00":ENTRY}')),
    ("quotes and blanks", framed({"it's \"it\"": entry()})),
    ("a path as a name", framed({"../../x": entry()})),
    ("an absolute path as a name", framed({"/abs": entry()})),
    ("a terminal escape as a name", framed({"\x1b[31m\n": entry()})),
]  # fmt: skip


@pytest.mark.parametrize(("what", "raw"), by_name(ACCEPTED))
def test_unusual_but_sound_headers_are_read_as_the_reference_reads_them(what, raw, write):
    assert_as_reference(write(raw), raw)


def assert_as_reference(path, raw):
    tensors, metadata, _ = read_header(path)
    expected = dict(safetensors.deserialize(raw))
    assert {
        name: (ref.dtype, list(ref.shape), raw[ref.offset : ref.offset + ref.nbytes])
        for name, ref in tensors.items()
    } == {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in expected.items()}
    offsets = [ref.offset for ref in tensors.values()]
    assert offsets == sorted(offsets)
    with safetensors.safe_open(path, framework="np") as file:
        assert metadata == (file.metadata() or {})


def test_every_dtype_of_the_format_is_known(write):
    assert BITS == dtypes.BITS
    raw = sound({f"t.{dtype}": (dtype, (2, 4)) for dtype in BITS}, {"format": "pt"})
    assert_as_reference(write(raw), raw)


def test_files_of_the_numpy_writer_are_read_byte_for_byte(tmp_path):
    arrays = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "single": np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4, 1),
        "double": np.array(3.5),
        "long": np.arange(3, dtype=np.int64),
        "truth": np.array([True, False, True]),
        "nothing": np.zeros((0, 7), np.float32),
        "bytes": np.arange(5, dtype=np.uint8),
    }
    path = tmp_path / "m.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"who": "numpy"})
    tensors, metadata, _ = read_header(path)
    raw = path.read_bytes()
    assert metadata == {"who": "numpy"}
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        ref = tensors[name]
        assert raw[ref.offset : ref.offset + ref.nbytes] == array.tobytes()
        assert (ref.shape, ref.n_elements) == (array.shape, array.size)


def test_files_of_the_torch_writer_with_narrow_floats_are_read(tmp_path):
    import safetensors.torch
    import torch

    values = torch.tensor([[1.0, -2.0, 0.5]])
    narrow = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({code: values.to(t) for code, t in narrow.items()}, path)
    tensors, _, _ = read_header(path)
    raw = path.read_bytes()
    for code, dtype in narrow.items():
        ref = tensors[code]
        assert (ref.dtype, ref.shape) == (code, (1, 3))
        data = values.to(dtype).view(torch.uint8).numpy().tobytes()
        assert raw[ref.offset : ref.offset + ref.nbytes] == data


def test_the_stamp_identifies_the_file(write):
    path = write(framed({"a": entry()}))
    header = path.read_bytes()[8:-4]
    stamp, status = read_header(path)[2], os.stat(path)
    assert (stamp.path, stamp.nbytes, stamp.inode) == (str(path), len(GOOD), status.st_ino)
    assert stamp.header_digest == hashlib.blake2b(header, digest_size=16).hexdigest()
    assert stamp.describes(status)
    path.write_bytes(GOOD)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert not stamp.describes(os.stat(path))


# Paths that are not files.


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    path = tmp_path / "m.safetensors"
    os.mkfifo(path)
    with within(2), pytest.raises(ModelError, match=r"a pipe, not a regular file$"):
        read_header(path)


def test_a_directory_a_device_and_a_socket_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"a directory, not a regular file$"):
        read_header(tmp_path)
    device = tmp_path / "device.safetensors"
    device.symlink_to("/dev/zero")
    with within(2), pytest.raises(ModelError, match=r"a device, not a regular file$"):
        read_header(device)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(ModelError, match=r"a socket, not a regular file$"):
            read_header(tmp_path / "s")


def test_broken_links_and_missing_files_are_refused(tmp_path):
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in [
        ("dangling", "a symbolic link to a file that is missing"),
        ("loop", "leads back to itself"),
        ("missing", "no such file"),
        ("n" * 300, "too long"),
        ("nul\0", "not a valid path"),
        ("surrogate\ud800", "not a valid path"),
    ]:
        with pytest.raises(ModelError, match=message) as caught:
            read_header(tmp_path / name)
        assert str(caught.value).isprintable()


def test_a_link_to_a_blob_is_read_as_in_the_hub_cache(tmp_path):
    (tmp_path / "blob").write_bytes(GOOD)
    (tmp_path / "m.safetensors").symlink_to("blob")
    tensors, _, stamp = read_header(tmp_path / "m.safetensors")
    assert tensors["a"].path == stamp.path == str(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, ModelError),
        (errno.EACCES, ModelError),
        (errno.ELOOP, ModelError),
        (errno.EIO, WorldError),
        (errno.EMFILE, WorldError),
        (errno.ESTALE, WorldError),  # A network file system lost the file.
    ],
)
def test_what_the_user_can_cure_is_told_from_what_the_machine_did(number, kind):
    error = from_os("m.safetensors", OSError(number, os.strerror(number)))
    assert type(error) is kind
    assert str(error).startswith("m.safetensors: ")


def test_a_failing_disk_and_a_shrinking_file_are_the_worlds_fault(write, monkeypatch):
    path = write(GOOD)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(WorldError, match="Input/output error"):
        read_header(path)
    monkeypatch.setattr(os, "pread", lambda *_: b"")
    with pytest.raises(WorldError, match="became shorter"):
        read_header(path)


# Bounds: of time, memory, descriptors.


@pytest.mark.parametrize("length", [100_000_001, 2**31, 2**63, 2**64 - 1])
def test_a_huge_length_is_refused_before_anything_is_read(length, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_bytes(framed(b"{}", b"", length))
    os.truncate(path, 2**33)  # Sparse: the length may even be within the file.
    asked = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: asked.append(n) or pread(fd, n, at))
    with within(2), pytest.raises(ModelError, match=f"header length {length} exceeds"):
        read_header(path)
    assert asked == [8]


def test_a_hundred_thousand_overlapping_tensors_are_refused_quickly(write):
    path = write(framed({f"t{i}": entry() for i in range(100_000)}))
    with within(10), pytest.raises(ModelError, match=r"tensors 't0' and 't1' overlap$"):
        read_header(path)


def test_no_refusal_leaves_a_descriptor_open(write):
    before = len(os.listdir("/proc/self/fd"))
    for _, raw, _ in HOSTILE:
        if len(raw) < 10_000:
            with pytest.raises(ModelError):
                read_header(write(raw))
    assert len(os.listdir("/proc/self/fd")) == before


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
