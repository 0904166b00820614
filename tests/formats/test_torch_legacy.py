"""Checkpoints as torch wrote them before its files were archives."""

import struct

import pytest

from streammerge.formats.torch_file import read_pickle
from tests.formats.torch_bytes import (
    SOUND,
    archive,
    call,
    name,
    named,
    number,
    refusal,
    tensor,
    text,
    tuple_,
    write,
)

# Files that torch wrote before 1.6.

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


KEYS = b"\x80\x02](" + text("0") + b"e."


BEHIND = struct.pack("<q", 6) + bytes(range(24))


def about(little=b"\x88"):
    return b"\x80\x02}" + text("little_endian") + little + b"s."


def behind(key="0", count=6, view=b"N", dtype="FloatStorage"):
    parts = text("storage"), name("torch", dtype), text(key), text("cpu"), number(count), view
    return tuple_(*parts) + b"Q"


def legacy(program=None, *, version=b"\x80\x02M\xe9\x03.", info=None, keys=KEYS, data=BEHIND, **fields):
    program = named(("w", tensor(data=behind(), **fields))) if program is None else program
    return MAGIC + version + (about() if info is None else info) + program + keys + data


def viewed(first, size, key="v"):
    return named(("w", tensor(data=behind(view=tuple_(text(key), number(first), number(size))))))


# (what is wrong, the file, a part of the message)
LEGACY = [
    ("only the number", MAGIC, "broken"),
    ("another version", legacy(version=b"\x80\x02K\1."), "of version '1'"),
    ("a version of text", legacy(version=b"\x80\x02" + text("x") + b"."), "of version"),
    ("big-endian", legacy(info=about(b"\x89")), "big-endian"),
    ("no byte order", legacy(info=b"\x80\x02}."), "big-endian"),
    ("cut in the data", legacy(data=BEHIND[:-1]), "truncated: storage '0' ends at byte"),
    ("no data", legacy(data=b""), "storage '0' is beyond the end"),
    ("another count", legacy(data=struct.pack("<q", 5) + bytes(24)), "has 5 elements, not the 6"),
    ("a negative count", legacy(data=struct.pack("<q", -6) + bytes(24)), "has -6 elements"),
    ("no keys", legacy(keys=b"\x80\x02]."), "list of storages is not that of its tensors"),
    ("other keys", legacy(keys=b"\x80\x02](" + text("1") + b"e."), "not that of its tensors"),
    ("a key twice", legacy(keys=b"\x80\x02](" + text("0") * 2 + b"e."), "list of storages is broken"),
    ("keys of numbers", legacy(keys=b"\x80\x02](K\0e."), "list of storages is broken"),
    ("keys in a dict", legacy(keys=b"\x80\x02}."), "list of storages is broken"),
    ("one too many", legacy(shape=(7,), strides=(1,)), "wants bytes 0 to 28 of 'storage 0', which has 24"),
    ("a view beyond", legacy(viewed(1, 6)), "a view ends beyond storage '0'"),
    ("a view that is too short", legacy(viewed(1, 5)), "wants bytes 0 to 24 of 'storage 0', which has 20"),
    ("a view from before", legacy(viewed(-1, 6)), "broken"),
    ("endless elements", legacy(named(("w", tensor(data=behind(count=2**62))))), "broken"),
    ("two sizes", legacy(named(("w", tensor(data=behind())), ("v", tensor(data=behind(count=5))))), "two sizes"),
    ("code", legacy(b"\x80\x02" + call("os", "system", text("true")) + b"."), "'os.system'"),
    ("a memo bomb", legacy(b"\x80\x02Nr\xff\xff\xff\x0f."), "broken"),
    ("a tar archive", b"a" * 257 + b"ustar\0" + bytes(1000), "a tar archive"),
    ("GGUF", b"GGUF" + bytes(100), "a GGUF file"),
    ("TorchScript", archive(SOUND, ("a/code/x.py", b"")), "a TorchScript archive"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "part"), [row[1:] for row in LEGACY], ids=[row[0] for row in LEGACY])
def test_an_old_file_that_lies_is_refused_in_one_line(tmp_path, raw, part):
    assert part in refusal(write(tmp_path, raw))


def test_old_files_are_read_as_they_are(tmp_path):
    raw = legacy()
    for sound in (
        raw,
        legacy(named(("w", tensor(data=behind(view=tuple_(text("v"), number(0), number(6))))))),
    ):
        ref = read_pickle(write(tmp_path, sound))[0]["w"]
        assert sound[ref.offset : ref.offset + ref.nbytes] == bytes(range(24))
    part = named(("w", tensor((2,), (1,), data=behind(view=tuple_(text("v"), number(2), number(3))), skip=1)))
    ref = read_pickle(write(tmp_path, legacy(part)))[0]["w"]
    assert legacy(part)[ref.offset : ref.offset + ref.nbytes] == bytes(range(12, 20))


def test_what_python_2_wrote_is_read(tmp_path):
    """Its memo begins at 1, its strings are bytes, and its ordered dicts are lists of pairs."""

    def short(value):
        return b"U" + bytes([len(value)]) + value.encode()

    old = tensor().replace(text("0"), short("0")).replace(text("storage"), short("storage") + b"q\1")
    pair = b"](" + short("w") + old + b"e"
    program = b"\x80\x02" + call("collections", "OrderedDict", b"](" + pair + b"e") + b"."
    assert read_pickle(write(tmp_path, archive(program)))[0]["w"].shape == (2, 3)
