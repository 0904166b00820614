"""Checkpoints of torch.save that lie: programs of strangers, damaged archives, sizes without bounds."""

import codecs
import copyreg
import os
import pickle
import random
import subprocess
import sys
import zipfile

import pytest
import torch

from streammerge.errors import ModelError, WorldError
from streammerge.formats import torch_pickle as machine
from streammerge.formats import zip_archive as archives
from streammerge.formats.torch_file import read_pickle
from tests.formats.safetensors_files import within
from tests.formats.torch_bytes import (
    NO_HOOKS,
    SOUND,
    archive,
    call,
    name,
    named,
    number,
    refusal,
    storage,
    tensor,
    text,
    tuple_,
    write,
    zip64,
)
from tests.patience import PATIENCE

UINT16 = name("torch", "uint16")


# Programs that must never run.


class Run:
    """Pickles to a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def calls(marker):
    """Yield programs that touch the file `marker`, should anything of them be run."""
    shell, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    for protocol in range(6):
        yield pickle.dumps(Run(os.system, shell), protocol)
        yield pickle.dumps({"w": Run(eval, code)}, protocol)
        yield pickle.dumps(Run(open, str(marker), "w"), protocol)
        yield pickle.dumps(Run(getattr, Run(__import__, "os"), "system"), protocol)
        yield pickle.dumps(Run(subprocess.getoutput, shell), protocol)
    for module in ("os", "posix", "nt", "__builtin__", "builtins", "torch", "torch.serialization"):
        for attribute in ("system", "eval", "load", "os.system", "_utils._rebuild_tensor_v2"):
            for args in (text(shell), text(code)):
                yield b"\x80\x02" + call(module, attribute, args) + b"."
                stack_global = text(module) + text(attribute) + b"\x93"
                yield b"\x80\x04" + stack_global + tuple_(args) + b"R."
                yield b"\x80\x02(" + args + f"i{module}\n{attribute}\n.".encode()  # INST
                yield b"\x80\x02(" + name(module, attribute) + args + b"o."  # OBJ
                yield b"\x80\x02" + name(module, attribute) + tuple_(args) + b"\x81."  # NEWOBJ
    system = name("torch._utils", "_rebuild_tensor_v2") + text("__globals__")
    yield b"\x80\x02" + call("builtins", "getattr", system) + b"."
    yield b"\x80\x02" + NO_HOOKS + text("__setstate__") + name("os", "system") + b"s" + text(shell) + b"b."
    yield b"\x80\x02" + text("os.system") + tuple_(text(shell)) + b"R."  # A string is no function.
    yield b"\x80\x02" + storage() + tuple_(text(shell)) + b"R."
    yield b"\x80\x02\x82\x01."  # EXT1, registered below.


def test_no_program_of_a_stranger_is_run(tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    monkeypatch.setitem(copyreg._inverted_registry, 1, ("os", "system"))
    for program in calls(marker):
        refusal(write(tmp_path, archive(program)))
        refusal(write(tmp_path, program))
    assert not marker.exists()


def test_a_foreign_name_is_refused_by_name(tmp_path):
    line = refusal(write(tmp_path, archive(pickle.dumps(Run(codecs.encode, "a", "rot13"), 2))))
    assert "'_codecs.encode'" in line
    line = refusal(write(tmp_path, archive(b"\x80\x02c" + b"\x1b[31m" * 100 + b"\nx\n.")))
    assert r"\x1b[31m" in line


def test_torch_is_not_imported():
    code = "import sys, streammerge.formats.torch_file; assert not {'torch', 'numpy', 'pickle'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


# Files that are broken, or lie.

TUPLES = named(("w", b")" + b"\x85" * 100_000))


DICTS = b"\x80\x02" + (b"}" + text("w")) * 100_000 + b"}" + b"s" * 100_000 + b"."


LAUGHS = b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 1000 + b"."


BYTES = storage("0", "ByteStorage", 24)


UNTYPED = (
    tuple_(text("storage"), name("torch.storage", "UntypedStorage"), text("0"), text("cpu"), number(24))
    + b"Q"
)


V3 = {"kind": "_rebuild_tensor_v3", "shape": (12,), "strides": (1,)}


def shaped(*args, **fields):
    return named(("w", tensor(*args, **fields)))


# (what is wrong, the program, a part of the message)
PROGRAMS = [
    ("stride-0 view", shaped((10**6, 10**6), (0, 0)), "'w': a view of 4000000000000 bytes upon 4 (stride 0)"),
    ("transposed, one row too many", shaped((3, 3), (1, 3)), "wants bytes 0 to 36 of 'a/data/0', which has 24"),
    ("every second, one too many", shaped((4,), (2,)), "wants bytes 0 to 28"),
    ("a long step", shaped((2,), (2**62,)), "wants bytes 0 to 18446744073709551620"),
    ("long steps", shaped((2,) * 64, (2**62,) * 64), "more elements than 64 bits"),
    ("overlapping, beyond the end", shaped((5, 3), (1, 1)), "wants bytes 0 to 28"),
    ("one too many", shaped((7,), (1,)), "wants bytes 0 to 28 of 'a/data/0', which has 24"),
    ("beyond the storage", shaped((2,), (1,), 5), "bytes 20 to 28"),
    ("far beyond", shaped((2,), (1,), 2**63 - 1), "bytes 36893488147419103228"),
    ("negative offset", shaped((2,), (1,), -1), "whole numbers from 0"),
    ("negative size", shaped((-2, -3), (3, 1)), "whole numbers from 0"),
    ("negative stride", shaped((2, 3), (-3, 1)), "whole numbers from 0"),
    ("fewer strides", shaped((2, 3), (1,)), "whole numbers from 0"),
    ("endless elements", shaped((2**62, 2**62), (2**62, 1)), "64 bits"),
    ("endless but empty", shaped((2**62, 4, 0), (0, 0, 0)), "64 bits"),
    ("65 dimensions", shaped((1,) * 65, (1,) * 65), "65 dimensions"),
    ("a boolean for a size", named(("w", tensor().replace(number(2), b"\x88"))), "whole numbers from 0"),
    ("a number for a shape", named(("w", tensor().replace(tuple_(number(2), number(3)), b"K\x06"))), "whole"),
    ("conjugated", shaped(more=[b"}" + text("conj") + b"\x88s"]), "conjugated"),
    ("two more arguments", shaped(more=[b"}", b"}"]), "conjugated"),
    ("no such storage", shaped(data=storage("1")), "no storage '1'"),
    ("up and out", shaped(data=storage("../byteorder")), "no storage '../byteorder'"),
    ("fewer elements", shaped(data=storage(count=5)), "24 bytes, not 5 elements of F32"),
    ("more elements", shaped(data=storage(count=2**62)), "24 bytes, not 4611686018427387904 elements"),
    ("negative count", shaped(data=storage(count=-6)), "24 bytes, not -6"),
    ("wider elements", shaped(data=storage(dtype="DoubleStorage")), "24 bytes, not 6 elements of F64"),
    ("quantized", shaped(data=storage(dtype="QInt8Storage")), "'torch.QInt8Storage'"),
    ("no storage", shaped(data=text("0")), "broken"),
    ("not a storage", shaped(data=storage(word="module")), "broken"),
    ("text as storage", shaped(data=text("0") + b"Q"), "broken"),
    ("nested storage", shaped(data=tuple_(*[storage()] * 5) + b"Q"), "broken"),
    ("typed bytes for a young dtype", shaped(**V3, data=BYTES, more=[UINT16]), "broken"),
    ("bytes without a dtype", shaped(data=UNTYPED), "broken"),
    ("text for a dtype", shaped(**V3, data=UNTYPED, more=[text("uint16")]), "broken"),
    ("a storage for a dtype", shaped(**V3, data=UNTYPED, more=[name("torch", "HalfStorage")]), "broken"),
    ("a young dtype, one too many", shaped(**V3, data=UNTYPED, skip=1, more=[UINT16]), "bytes 2 to 26"),
    ("a parameter of nothing", named(("w", call("torch._utils", "_rebuild_parameter", b"NN}"))), "broken"),
    ("a dict of something", named(("w", call("collections", "OrderedDict", b"}"))), "broken"),
    ("attributes of a name", named(("w", name("torch", "uint16") + b"}" + text("a") + b"K\1sb")), "broken"),
    ("items of a tensor", named(("w", tensor() + text("a") + b"Ns")), "broken"),
    ("a foreign parameter", named(("l.w", tensor()), ("l.b", call("torchao", "Q", text("x")))), "'l.b' is no tensor but an object that needs 'torchao.Q'"),
    ("a foreign bias", named(("weight", tensor()), ("bias", call("torchao", "Q", text("x")))), "'bias' is no tensor but an object that needs 'torchao.Q'"),
    ("a storage alone", named(("w", storage())), "'w' is no tensor"),
    ("two wrapped dicts", named(("a", b"}"), ("b", b"}")), "'a' is no tensor but of type dict"),
    ("wrapped twice", named(("a", named(("b", SOUND[2:-1]))[2:-1])), "'a' is no tensor but of type dict"),
    ("a list", b"\x80\x02].", "holds no tensors by name"),
    ("a list of itself", b"\x80\x02]q\0h\0a.", "holds no tensors by name"),
    ("deep lists", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "holds no tensors by name"),
    ("items for no list", b"\x80\x02}K\1a.", "broken"),
    ("a whole module", b"\x80\x02" + call("models.yolo", "Model", text("x")) + b".", "'models.yolo.Model'"),
    ("a module under its name", named(("model", call("yolo", "M"))), "an object that needs 'yolo.M': save its state_dict()"),
    ("a tensor of another kind", named(("w", call("torch._utils", "_rebuild_qtensor", storage()))), "'torch._utils._rebuild_qtensor'"),
    ("a tensor without data", named(("w", call("torch._utils", "_rebuild_meta_tensor_no_storage", b"N"))), "no tensor but an object"),
    ("a type within a type", named(("w", call("torch._tensor", "_rebuild_from_type_v2", name("torch._tensor", "_rebuild_from_type_v2"), b"N", b")", b"N"))), "broken"),
    ("a type of text", named(("w", call("torch._tensor", "_rebuild_from_type_v2", text("f"), b"N", b")", b"N"))), "broken"),
    ("a dict of half pairs", b"\x80\x02" + call("collections", "OrderedDict", b"](](K\1eae") + b".", "broken"),
    ("a dict of pairs, one twice", b"\x80\x02" + call("collections", "OrderedDict", b"](](" + text("w") + b"Ne](" + text("w") + b"Nee") + b".", "the key 'w' twice"),
    ("a shell beside the weights", named(("state_dict", SOUND[2:-1]), ("x", call("os", "system", text("true")))), "'os.system', which no checkpoint needs"),
    ("a shell never called", named(("state_dict", SOUND[2:-1]), ("x", name("builtins", "eval"))), "'builtins.eval', which no"),
    ("terabytes of bytes", b"\x80\x02\x8e\xff\xff\xff\xff\xff\xff\0\0.", "broken"),
    ("a slot beyond the next", b"\x80\x02Nr\2\0\0\0.", "broken"),
    ("a bare tensor", b"\x80\x02" + tensor() + b".", "holds no tensors by name"),
    ("nothing", b"\x80\x02}.", "holds no tensors"),
    ("nothing, wrapped", named(("a", b"}")), "holds no tensors"),
    ("a dict of itself", b"\x80\x02}q\0" + text("a") + b"h\0s.", "'a' is no tensor but of type dict"),
    ("twice the name", named(("w", tensor()), ("w", tensor())), "the key 'w' twice"),
    ("no name", named(("", tensor())), "the name ''"),
    ("long name", named(("x" * 4097, tensor())), "4096 characters"),
    ("longer name", named(("x" * 20_000, tensor())), "a key of type Foreign"),
    ("a name of no text", b"\x80\x02}K\1" + tensor() + b"s.", "a key of type int"),
    ("a name of control characters", named(("\x1b[2J\n", b"N")), r"'\x1b[2J\n' is no tensor"),
    ("half a surrogate", b"\x80\x02}X\3\0\0\0\xed\xa0\x80" + tensor() + b"s.", "broken"),
    ("deep key", b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.", "a key of type tuple"),
    ("deep tuples", TUPLES, "'w' is no tensor but of type tuple"),
    ("deep dicts", DICTS, "is no tensor but of type dict"),
    ("deep marks", b"\x80\x02" + b"(" * 100_000 + b".", "broken"),
    ("deep call", b"\x80\x02" + NO_HOOKS[:-2] + b")" + b"\x85" * 100_000 + b"R.", "broken"),
    ("deep shape", named(("w", tensor().replace(number(2), b")" + b"\x85" * 100_000))), "whole numbers"),
    ("2^1000 tuples", LAUGHS, "holds no tensors"),
    ("2^28 slots", b"\x80\x02Nr\xff\xff\xff\x0f.", "broken before byte 8"),
    ("4 GiB of text", b"\x80\x02X\xff\xff\xff\xff.", "broken"),
    ("2 GiB integer", b"\x80\x02\x8b\xff\xff\xff\x7f.", "opcode 0x8b"),
    ("255 byte integer", b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "no tensors by name but a long integer"),
    ("unknown memo", b"\x80\x02h\0.", "broken"),
    ("endless line", b"\x80\x02c" + b"x" * 5000 + b"\n.", "broken"),
    ("numbers for a name", b"\x80\x04K\1K\2\x93.", "broken"),
    ("nothing on the stack", b"\x80\x02.", "broken"),
    ("nothing to pop", b"\x80\x02R.", "broken"),
    ("no mark", b"\x80\x02t.", "broken"),
    ("a key without value", b"\x80\x02}(" + text("w") + b"u.", "broken"),
    ("cut", SOUND[:-1], "broken"),
    ("empty", b"", "broken"),
    ("protocol 0", b"(dp0\n.", "opcode 0x64"),
]  # fmt: skip


@pytest.mark.parametrize(("program", "part"), [row[1:] for row in PROGRAMS], ids=[row[0] for row in PROGRAMS])
def test_a_program_that_lies_is_refused_in_one_line(tmp_path, program, part):
    assert part in refusal(write(tmp_path, archive(program)))


DATA, PKL = {"change": "a/data/0"}, {"change": "a/data.pkl"}


START = archive().index(b"PK\3\4", 40)


# (what is wrong, the file, a part of the message)
ARCHIVES = [
    ("empty", b"", "an empty file"),
    ("one byte", b"P", "no zip archive"),
    ("a plain pickle", pickle.dumps({"w": 1}), "convert it to safetensors"),
    ("git-lfs", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ("a web page", b"<!DOCTYPE html>", "web page"),
    ("only a start", b"PK\3\4", "truncated"),
    ("cut by one", archive()[:-1], "truncated"),
    ("cut in half", archive()[: len(archive()) // 2], "truncated"),
    ("one byte more", archive(tail=b"\0"), "truncated"),
    ("a comment", archive(end=[(7, 4)], tail=b"text"), "truncated"),
    ("moved", b"PK\3\4" + archive(), "not where it says"),
    ("no data.pkl", archive().replace(b"data.pkl", b"DATA.PKL"), "0 entries */data.pkl"),
    ("two data.pkl", archive(SOUND, ("b/data.pkl", SOUND)), "2 entries */data.pkl"),
    ("big-endian", archive().replace(b"little", b"big\0\0\0"), "byteorder is not little"),
    ("no byteorder", archive().replace(b"little", b"Little"), "byteorder is not little"),
    ("twice a storage", archive(SOUND, ("a/data/0", bytes(24))), "the entry 'a/data/0' twice"),
    ("compressed", archive(**DATA, method=8, c_method=8), "'a/data/0' is compressed or encrypted"),
    ("compressed program", archive(**PKL, method=8, c_method=8), "'a/data.pkl' is compressed"),
    ("compressed, it says", archive(**DATA, c_method=8), "compressed"),
    ("compressed, says only the entry", archive(**DATA, method=8), "contradicts"),
    ("encrypted", archive(**DATA, c_flags=1), "encrypted"),
    ("encrypted, says only the entry", archive(**DATA, flags=1), "contradicts"),
    ("hidden", archive(**DATA, c_flags=0x2000), "encrypted"),
    ("packed into less", archive(**DATA, packed=23), "compressed"),
    ("a directory, in DOS", archive(**DATA, external=0x10), "'a/data/0' is marked as a directory"),
    ("elsewhere", archive(**DATA, disk=1), "compressed or encrypted"),
    ("two sizes", archive(**DATA, size=23), "contradicts"),
    ("no size, and none to follow", archive(**DATA, size=0), "contradicts"),
    ("two names", archive(**DATA, name="a/data/1"), "'a/data/0' is not where"),
    ("a longer name", archive(**DATA, name="a/data/00"), "not where"),
    ("no header", archive(**DATA, magic=b"PK\5\6"), "not where"),
    ("the program as a storage", archive(**DATA, start=0), "'a/data/0' is not where"),
    ("a header beyond the end", archive(**DATA, start=10**6), "'a/data/0' is beyond the end"),
    ("data beyond the end", archive(**DATA, size=10**6, c_size=10**6), "overlaps the directory"),
    ("data over the next", archive(**PKL, size=START, c_size=START), "'a/data.pkl' and 'a/byteorder' overlap"),
    ("padding over the next", archive(**PKL, extra=b"")[:28] + b"\4" + archive()[29:], "overlap"),
    ("no zip64 size", archive(**DATA, c_size=2**32 - 1), "no zip64 sizes"),
    ("half a zip64 size", archive(**DATA, c_size=2**32 - 1, c_extra=zip64(24)), "no zip64 sizes"),
    ("cut zip64 size", archive(**DATA, c_size=2**32 - 1, c_extra=zip64(24, 24)[:-1]), "no zip64 sizes"),
    ("2^64 bytes", archive(**DATA, c_size=2**32 - 1, c_extra=zip64(*[2**64 - 1] * 2)), "contradicts"),
    ("2^64 offset", archive(**DATA, start=2**32 - 1, c_extra=zip64(2**64 - 1)), "beyond the end"),
    ("long name", archive(SOUND, ("a/" + "x" * 4095, b"")), "its name too long"),
    ("another end", archive(end=[(5, 1)]), "contradict each other"),
    ("another zip64 end", archive(end64=[(0, b"PK\0\0")]), "contradict each other"),
    ("a longer zip64 end", archive(end64=[(1, 45)]), "contradict each other"),
    ("several parts", archive(end64=[(6, 2)], end=[(3, 2)]), "not where its end says"),
    ("on another disk", archive(end64=[(4, 1)]), "contradict each other"),
    ("one entry less", archive(end64=[(6, 2), (7, 2)], end=[(3, 2), (4, 2)]), "more than its 2 entries"),
    ("one entry more", archive(end64=[(6, 4), (7, 4)], end=[(3, 4), (4, 4)]), "is broken"),
    ("many entries", archive(end64=[(6, 2**40), (7, 2**40)], end=[(3, 2**16 - 1), (4, 2**16 - 1)]), "more than 200000"),
    ("a directory elsewhere", archive(end64=[(9, 5)], end=[(6, 5)]), "not where its end says"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "part"), [row[1:] for row in ARCHIVES], ids=[row[0] for row in ARCHIVES])
def test_an_archive_that_lies_is_refused_in_one_line(tmp_path, raw, part):
    assert part in refusal(write(tmp_path, raw))


@pytest.mark.parametrize(
    ("limit", "value", "part"),
    [
        ("MAX_STEPS", 10, "more than 10 opcodes"),
        ("MAX_NBYTES", 180, "its data.pkl has 190"),
        ("MAX_NBYTES", 100, "directory has 167"),
        ("MAX_ENTRIES", 2, "has 3 entries, more than 2"),
    ],
)
def test_size_is_bounded_before_it_is_read(tmp_path, monkeypatch, limit, value, part):
    path = write(tmp_path, archive())
    monkeypatch.setattr(machine if limit == "MAX_STEPS" else archives, limit, value)
    assert part in refusal(path)


def test_both_forms_of_an_end_and_of_a_header_are_read(tmp_path):
    raw, end64 = archive(), 56 + 20
    short = raw[: -22 - end64] + raw[-22:]
    for sound in (raw, short, archive(**DATA, size=0, flags=8), archive(**DATA, extra=b"FB\2\0ZZ")):
        path = write(tmp_path, sound)
        ref = read_pickle(path)[0]["w"]
        assert sound[ref.offset : ref.offset + ref.nbytes] == bytes(range(24))


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with within(60):
        assert "a pipe" in refusal(tmp_path / "pipe")
    assert "a directory" in refusal(tmp_path)
    assert "no such file" in refusal(tmp_path / "missing")


def mutated(raw, draw):
    """Return `raw` with a few bytes changed, removed, repeated or cut."""
    raw = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at, n = draw.randrange(len(raw)), draw.choice((1, 1, 2, 4, 30))
        match draw.randrange(5):
            case 0:
                raw[at] ^= 1 << draw.randrange(8)
            case 1:
                raw[at] = draw.choice((0, 1, 0x28, 0x2E, 0x51, 0x52, 0x62, 0x7F, 0x80, 0xFF))
            case 2:
                del raw[at : at + n]
            case 3:
                raw[at:at] = raw[draw.randrange(len(raw)) :][:n]
            case 4:
                raw[at : at + n] = draw.randbytes(n)
    return bytes(raw) or b"\0"


def assert_parsed_or_refused(path):
    try:
        refs, _ = read_pickle(path)
    except (ModelError, WorldError):
        return False
    assert refs
    lie = [ref.stored for ref in refs.values()]
    assert all(0 <= ref.offset <= ref.offset + ref.nbytes <= os.stat(path).st_size for ref in lie)
    return True


@pytest.mark.parametrize("part", ["file", "program"])
def test_random_damage_is_parsed_or_refused(tmp_path, part):
    draw = random.Random(part)
    state = {
        "a": torch.ones(2, 3),
        "b": torch.nn.Parameter(torch.ones(3).half()),
        "c": torch.ones(2).to(torch.uint16),
    }
    torch.save({"model": state}, tmp_path / "m.pt")
    raw = (tmp_path / "m.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "m.pt") as python:
        program = python.read("m/data.pkl")
        others = [
            (entry.replace("m/", "a/", 1), python.read(entry))
            for entry in python.namelist()
            if "/data/" in entry
        ]
    kept = 0
    for _ in range(400):
        if part == "file":
            damaged = mutated(raw, draw)
        else:
            damaged = archive(mutated(program, draw), *others[1:], data=others[0][1])
        kept += assert_parsed_or_refused(write(tmp_path, damaged))
    assert 0 < kept < 400  # Both happen, or the damage is not of the right size.
