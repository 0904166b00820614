"""Files of the format written by hand, sound and hostile."""

import json

import pytest

from tests.formats.safetensors_files import entry, framed

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


@pytest.fixture
def write(tmp_path):
    def write(raw):
        path = tmp_path / "model.safetensors"
        path.write_bytes(raw)
        return path

    return write
