"""Changes that keep the frame of an input whole: JSON stays JSON, lengths and checksums fit again.

Every function takes the bytes of an input and a random source and returns other bytes. An input that does not
have the frame comes back None: then the fuzzer changes its bytes blindly.
"""

from __future__ import annotations

import contextlib
import pickletools
import struct
import zlib
from itertools import pairwise
from random import Random

from fuzz_json import TEXTS, Blind, Pairs, change_json, parse_json, render_json


def header(raw: bytes, rng: Random, blind: Blind) -> bytes | None:
    """Change the header of a safetensors file; then mostly let length, offsets and data fit again."""
    if len(raw) < 8 or not 0 < (n := int.from_bytes(raw[:8], "little")) <= len(raw) - 8:
        return None
    text, data = raw[8 : 8 + n], raw[8 + n :]
    value = parse_json(text)
    if value is None or rng.random() < 0.1:
        text = blind(text)
    else:
        value = change_json(value, rng)
        if isinstance(value, Pairs) and rng.random() < 0.6:
            data = _fit(value, rng)
        text = render_json(value).encode("utf-8", "surrogatepass")
    if rng.random() < 0.3:
        text += b" " * (-len(text) % 8)
    length = len(text) + (rng.choice([-1, 1, 8]) if rng.random() < 0.02 else 0)
    return struct.pack("<Q", max(0, length)) + text + data


_WIDTHS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BF16": 16,
    "F16": 16,
    "F64": 64,
    "I64": 64,
    "C64": 64,
    "F32": 32,
    "I32": 32,
}


def _fit(tensors: Pairs, rng: Random) -> bytes:
    """Give the tensors offsets that follow from their shapes, and return that much data."""
    end = 0
    for _, entry in tensors:
        if not isinstance(entry, Pairs):
            continue
        fields = dict(entry)
        shape, dtype = fields.get("shape"), fields.get("dtype")
        bits = _WIDTHS.get(dtype, 8) if isinstance(dtype, str) else 8
        if isinstance(shape, list) and all(type(size) is int for size in shape):
            for size in shape:
                bits *= size
        nbytes = bits // 8 if 0 <= bits < 1 << 16 else 0
        for i, (key, _) in enumerate(entry):
            if key == "data_offsets":
                entry[i] = (key, [end, end + nbytes])
        end += nbytes
    return bytes(rng.randrange(256) for _ in range(min(end, 16))).ljust(end, b"\1")[:end]


def journal(raw: bytes, rng: Random, blind: Blind) -> bytes | None:
    """Change some lines of a journal, mostly with a checksum that is right again."""
    lines = raw.split(b"\n")[:-1]
    if not lines:
        return None
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(lines))
        text = lines[i][9:]
        value = parse_json(text)
        what = rng.randrange(6)
        if what == 0:
            lines.insert(i, lines[i])
        elif what == 1 and len(lines) > 1:
            del lines[i]
            continue
        elif value is None or what == 2:
            text = blind(text)
        else:
            text = render_json(change_json(value, rng, [*TEXTS, "done", "answer", "identity"])).encode(
                "utf-8", "surrogatepass"
            )
        if rng.random() < 0.95:
            text = text.replace(b"\n", b" ")
        lines[i] = b"%08x %s" % (zlib.crc32(text), text)
    return b"".join(line + b"\n" for line in lines)


SEAL = b'\n"manifest_crc32": '


def manifest(raw: bytes, rng: Random, blind: Blind) -> bytes | None:
    """Change a manifest and seal it again."""
    value = parse_json(raw)
    if not isinstance(value, Pairs) or not value or value[-1][0] != "manifest_crc32":
        return None
    value = change_json(
        Pairs(value[:-1]),
        rng,
        [*TEXTS, "files", "nbytes", "crc32", "tensors", "dtype", "shape", "not_finite", "sha256"],
    )
    text = render_json(value).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        text = blind(text)
    body = text.removesuffix(b"}") + b","
    return body + SEAL + b'"%08x"\n}\n' % zlib.crc32(body)


def pickled(raw: bytes, rng: Random, blind: Blind) -> bytes | None:
    """Change the program of a checkpoint, opcode by opcode, or its entries, and build the archive anew."""
    entries = unzip(raw)
    if not entries:
        return None
    at = next((i for i, (name, _) in enumerate(entries) if name.endswith(b"/data.pkl")), None)
    if at is None or rng.random() < 0.15:
        _change_entries(entries, rng, blind)
    else:
        name, program = entries[at]
        entries[at] = (name, _change_program(program, rng, blind))
    return zipped(entries)


def _change_entries(entries: list[tuple[bytes, bytes]], rng: Random, blind: Blind) -> None:
    i = rng.randrange(len(entries))
    name, data = entries[i]
    what = rng.randrange(5)
    if what == 0 and len(entries) > 1:
        del entries[i]
    elif what == 1:
        entries.insert(i, entries[i])
    elif what == 2:
        entries[i] = (blind(name)[:200], data)
    elif what == 3:
        entries[i] = (name, data + bytes(rng.choice([1, 4, 8])))
    else:
        entries[i] = (name, blind(data))


def _change_program(program: bytes, rng: Random, blind: Blind) -> bytes:
    ops = split_ops(program)
    if len(ops) < 2 or rng.random() < 0.1:
        return blind(program)
    for _ in range(rng.randint(1, 3)):
        i, j = rng.randrange(len(ops)), rng.randrange(len(ops))
        what = rng.randrange(7)
        if what == 0 and len(ops) > 1:
            del ops[i]
        elif what == 1:
            ops.insert(j, ops[i])
        elif what == 2:
            ops[i], ops[j] = ops[j], ops[i]
        elif what == 3:
            ops[i:i] = ops[j : j + rng.randint(1, 30)][:30]
        elif what == 4:
            ops[i] = ops[i][:1] + blind(ops[i][1:])
        elif what == 5:
            number = rng.choice([0, 1, 2, 3, 6, 2**31 - 1, 2**62, 2**63 - 1, -1, -(2**63)])
            ops[i] = b"\x8a\x08" + struct.pack("<q", number)
        else:
            ops[i] = rng.choice(
                [
                    b"N",
                    b"\x88",
                    b"\x89",
                    b")",
                    b"}",
                    b"(",
                    b"t",
                    b"R",
                    b"Q",
                    b"b",
                    b"s",
                    b"u",
                    b"\x85",
                    b"\x86",
                    b"\x87",
                    b"\x94",
                    b"h\0",
                    b"q\0",
                    b"h\1",
                    b"K\3",
                ]
            )
    return b"".join(ops)


def split_ops(program: bytes) -> list[bytes]:
    """Return the opcodes of a pickle with their arguments, as far as it is sound."""
    starts = []
    with contextlib.suppress(Exception):
        for _, _, position in pickletools.genops(program):
            starts.append(position)
    return [program[a:b] for a, b in pairwise([*starts, len(program)])]


def unzip(raw: bytes) -> list[tuple[bytes, bytes]]:
    """Return the entries of an archive that `zipped` or torch wrote, as far as it is sound."""
    entries = []
    at = 0
    while raw[at : at + 4] == b"PK\3\4" and at + 30 <= len(raw):
        flags, _, _, _, _, _, size, n_name, n_extra = struct.unpack_from("<2H2H3I2H", raw, at + 6)
        name_end = at + 30 + n_name
        begin = name_end + n_extra
        if size == 0xFFFFFFFF or begin + size > len(raw) or flags & 8:
            return []
        entries.append((raw[at + 30 : name_end], raw[begin : begin + size]))
        at = begin + size
    return entries


def zipped(entries: list[tuple[bytes, bytes]]) -> bytes:
    """Return an archive of stored entries with both of its ends, as torch writes it."""
    raw, directory = b"", b""
    for name, data in entries:
        crc, n = zlib.crc32(data), len(data)
        directory += struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 0, 0, 0, 0, 0, 0, crc, n, n, len(name), 0, 0, 0, 0, 0, len(raw)
        )
        directory += name
        raw += struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0, 0, 0, 0, crc, n, n, len(name), 0) + name + data
    count, nbytes, start = len(entries), len(directory), len(raw)
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, count, count, nbytes, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, start + nbytes, 1)
    return (
        raw
        + directory
        + end64
        + locator
        + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, nbytes, start, 0)
    )
