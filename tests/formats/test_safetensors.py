"""Headers: sound ones agree with the safetensors library, hostile ones are refused in one line."""

import hashlib
import json
import os

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from streammerge import dtypes
from streammerge.checkpoint import read_header
from streammerge.errors import ModelError
from tests.formats.safetensors_cases import (
    GOOD,
    HOSTILE,
    text,
    two,
)
from tests.formats.safetensors_files import BITS, entry, framed, sound, within

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
