"""Checkpoints of torch.save made byte by byte: the program, the archive around it, and how it is refused."""

import struct

import pytest

from streammerge.errors import ModelError
from streammerge.formats.torch_file import read_pickle

# Programs, opcode by opcode.


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def tuple_(*parts):
    return b"(" + b"".join(parts) + b"t"


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def call(module, attribute, *args):
    return name(module, attribute) + tuple_(*args) + b"R"


def storage(key="0", dtype="FloatStorage", count=6, word="storage"):
    return tuple_(text(word), name("torch", dtype), text(key), text("cpu"), number(count)) + b"Q"


NO_HOOKS = call("collections", "OrderedDict")


def tensor(shape=(2, 3), strides=(3, 1), skip=0, data=None, kind="_rebuild_tensor_v2", more=()):
    sizes = [tuple_(*map(number, values)) for values in (shape, strides)]
    first = storage() if data is None else data
    return call("torch._utils", kind, first, number(skip), *sizes, b"\x89", NO_HOOKS, *more)


def named(*items):
    """Return the program of a dict of (name, program of the value)."""
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in items) + b"u."


SOUND = named(("w", tensor()))


# Archives, field by field.


def local(entry, data, *, magic=b"PK\3\4", flags=0, method=0, size=None, name=None, extra=b"", **_):
    sizes = [len(data) if size is None else size] * 2
    raw = (entry if name is None else name).encode("utf-8", "surrogateescape")
    return (
        struct.pack("<4s5H3I2H", magic, 0, flags, method, 0, 0, 0, *sizes, len(raw), len(extra)) + raw + extra
    )


def central(
    entry,
    data,
    start,
    *,
    c_flags=0,
    c_method=0,
    c_size=None,
    packed=None,
    c_extra=b"",
    disk=0,
    external=0,
    **_,
):
    size = len(data) if c_size is None else c_size
    packed = size if packed is None else packed
    raw = entry.encode("utf-8", "surrogateescape")
    numbers = (0, packed, size, len(raw), len(c_extra), 0, disk, 0, external, start)
    return struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, c_flags, c_method, 0, 0, *numbers) + raw + c_extra


def ends(count, nbytes, start, at, end64=(), end=()):
    """Return both ends of an archive, some fields replaced: (position, value)."""
    long = [b"PK\6\6", 44, 0, 0, 0, 0, count, count, nbytes, start]
    short = [b"PK\5\6", 0, 0, count, count, nbytes, start, 0]
    for fields, changes in ((long, end64), (short, end)):
        for i, value in changes:
            fields[i] = value
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, at, 1)
    return struct.pack("<4sQ2H2I4Q", *long) + locator + struct.pack("<4s4H2IH", *short)


def archive(program=SOUND, *more, change=None, end64=(), end=(), tail=b"", data=bytes(range(24)), **fields):
    """Return a checkpoint; `fields` are those of the entry that `change` names."""
    entries = [("a/data.pkl", program), ("a/byteorder", b"little"), ("a/data/0", data), *more]
    raw, directory = b"", b""
    for entry, content in entries:
        mine = fields if entry == change else {}
        directory += central(entry, content, **{"start": len(raw), **mine})
        raw += local(entry, content, **mine) + content
    nbytes, start = len(directory), len(raw)
    return raw + directory + ends(len(entries), nbytes, start, start + nbytes, end64, end) + tail


def zip64(*numbers):
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


def write(tmp_path, raw):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(raw)
    return str(path)


def refusal(path):
    """Return the one line that `path` is refused with."""
    with pytest.raises(ModelError) as caught:
        read_pickle(path)
    line = str(caught.value)
    assert len(line) < 1000
    assert line.isprintable()
    assert line.startswith(str(path)[:100])
    return line
