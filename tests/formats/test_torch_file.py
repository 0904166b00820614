"""Pickled checkpoints: what torch saves is found byte for byte, what strangers write never runs."""

import collections
import os
import zipfile

import pytest
import torch

from streammerge.formats.torch_file import read_pickle
from tests.formats.torch_bytes import (
    SOUND,
    archive,
    central,
    ends,
    local,
    named,
    storage,
    tensor,
    text,
    write,
    zip64,
)

# Files that torch saves.


def own_bytes(value):
    return bytes(value.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def assert_same(path, tensors):
    refs, stamp = read_pickle(path)
    assert refs.keys() == tensors.keys()
    raw = path.read_bytes()
    for key, ref in refs.items():
        assert (ref.name, ref.path, ref.shape) == (key, str(path), tuple(tensors[key].shape))
        assert raw[ref.offset : ref.offset + ref.nbytes] == own_bytes(tensors[key]), key
    assert [(r.offset, r.nbytes) for r in refs.values()] == sorted(
        (r.offset, r.nbytes) for r in refs.values()
    )
    assert stamp.describes(os.stat(path))
    return {key: ref.dtype for key, ref in refs.items()}


DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_is_found_byte_for_byte(tmp_path, protocol):
    values = torch.arange(0, 96, dtype=torch.float32).reshape(8, 12)
    tensors = {key: values.to(getattr(torch, key)) for key in DTYPES}
    torch.save(tensors, tmp_path / "m.pt", pickle_protocol=protocol)
    assert assert_same(tmp_path / "m.pt", tensors) == DTYPES


def test_every_shape_view_and_tie_is_found(tmp_path):
    x = torch.arange(120, dtype=torch.bfloat16).reshape(4, 5, 6)
    tensors = {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "empty, transposed": torch.empty(0, 3).T,
        "empty, far in": x[4:],
        "whole": x,
        "tied": x,
        "rows": x[2:],
        "one row, any stride": x[1:4:2][:1],
        "one element": x.reshape(-1)[7],
        "expanded by ones": x[1, 2].reshape(1, 6).as_strided((1, 6, 1), (0, 1, 77)),
        "ü\n€": torch.ones(3),
        "64 dimensions": torch.ones((1,) * 64),
        "frozen": torch.nn.Parameter(torch.rand(2, 2), requires_grad=False),
        "parameter": torch.nn.Parameter(x[3]),
        "viewed twice": torch.ones(4, dtype=torch.int64).view(2, 2),
    }
    torch.save(tensors, tmp_path / "m.pt")
    assert_same(tmp_path / "m.pt", tensors)


@pytest.mark.parametrize("n", [255, 256, 1500])
def test_models_with_any_number_of_tensors_are_read(tmp_path, n):  # The memo's opcodes change at 256.
    tensors = {f"layers.{i}.weight": torch.full((i % 7,), i % 100, dtype=torch.int8) for i in range(n)}
    torch.save(tensors, tmp_path / "m.pt")
    assert_same(tmp_path / "m.pt", tensors)


@pytest.mark.parametrize("wrap", [dict, collections.OrderedDict, lambda d: {"state_dict": d}])
def test_state_dicts_are_read_bare_and_wrapped(tmp_path, wrap):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()
    assert hasattr(state, "_metadata")
    torch.save(wrap(state), tmp_path / "m.pt")
    assert_same(tmp_path / "m.pt", state)


def test_the_archive_may_be_called_anything(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff\xfe model.bin")
    torch.save({"w": torch.ones(2)}, str(tmp_path / "archive.pt"))
    with open(path, "wb") as file:
        torch.save({"w": torch.ones(2)}, file)
    assert read_pickle(path)[0]["w"].nbytes == 8
    raw = archive()
    for entry in (b"a/data.pkl", b"a/byteorder", b"a/data/0"):
        raw = raw.replace(entry, b"\xff" + entry[1:])
    assert read_pickle(write(tmp_path, raw))[0]["w"].nbytes == 24


def test_what_python_repacks_uncompressed_is_read(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as old, zipfile.ZipFile(tmp_path / "n.pt", "w") as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    assert_same(tmp_path / "n.pt", {"w": torch.ones(2)})


def test_a_storage_beyond_four_gigabytes_is_located(tmp_path):
    size, path = 5 << 30, tmp_path / "large.pt"  # A hole: it takes no space.
    program = named(("w", tensor((size,), (1,), data=storage("0", "ByteStorage", size))))
    first = local("a/data.pkl", program) + program
    second = local("a/data/0", b"", size=0xFFFFFFFF, extra=zip64(size, size))
    third = local("a/data/1", b"x") + b"x"
    begin = len(first) + len(second)
    directory = central("a/data.pkl", program, 0)
    directory += central("a/data/0", b"", len(first), c_size=0xFFFFFFFF, c_extra=zip64(size, size))
    directory += central("a/data/1", b"x", 0xFFFFFFFF, c_extra=b"\7\0\1\0x" + zip64(begin + size))
    start = begin + size + len(third)
    with open(path, "wb") as file:
        file.write(first + second)
        file.seek(begin + size)
        last = ends(3, len(directory), start, start + len(directory), end=[(6, 0xFFFFFFFF)])
        file.write(third + directory + last)
    ref = read_pickle(path)[0]["w"]
    assert (ref.offset, ref.nbytes) == (begin, size)
    with zipfile.ZipFile(path) as python:
        assert [entry.file_size for entry in python.infolist()] == [len(program), size, 1]


def test_the_stamp_shows_a_change_of_names_or_places(tmp_path):
    digests = {
        read_pickle(write(tmp_path, raw))[1].header_digest
        for raw in (archive(), archive(named(("v", tensor()))), archive(SOUND, ("a/x", b"")))
    }
    assert len(digests) == 3
    assert all(len(digest) == 32 for digest in digests)


LONG = text("x" * 20_000)
