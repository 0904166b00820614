"""Reading back gives the checksum and the tally of every part, wherever the windows cut."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest

from streammerge.dtypes import BITS
from streammerge.io.reader import Reader
from streammerge.numerics.finite import Tally
from streammerge.output import readback
from streammerge.output.readback import Part, read_back

DTYPES = ("U8", "F64", "I64", "F32", "BF16", "F16", "BOOL")
BAD = {"F64": (np.float64, np.nan), "F32": (np.float32, -np.inf), "F16": (np.float16, np.inf)}


def write_parts(path: Path, sizes: list[int]) -> tuple[list[Part], bytes]:
    """Write parts of given numbers of elements, some of the last elements of each not finite."""
    parts, data = [], b""
    for number, n in enumerate(sizes):
        dtype = DTYPES[number % len(DTYPES)]
        kind, value = BAD.get(dtype, (np.uint8, 1))
        values = np.arange(n * (BITS[dtype] // 8 if kind is np.uint8 else 1), dtype=np.float64) % 100
        values[n // 2 :: 3] = value if kind is not np.uint8 else 0
        raw = values.astype(kind).tobytes()
        parts.append(Part(f"t{number}", len(data), len(raw), dtype))
        data += raw
    path.write_bytes(data)
    return parts, data


@pytest.mark.parametrize("window", [16, 1000, 4096, 1 << 23])
@pytest.mark.parametrize("step", [8, 1 << 19])
def test_checksums_and_tallies_do_not_depend_on_windows_and_steps(
    window: int, step: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(readback, "_WINDOW", window)
    monkeypatch.setattr(readback, "_STEP", step)
    parts, data = write_parts(tmp_path / "file", [3, 500, 0, 700, 33, 901, 17, 5, 1, 1, 0, 2, 0])
    found = read_back({str(tmp_path / "file"): parts})[str(tmp_path / "file")]
    for part, one in zip(parts, found, strict=True):
        raw = data[part.offset : part.offset + part.nbytes]
        assert one.crc == zlib.crc32(raw), part
        bad = np.zeros(0)
        if part.dtype in BAD:
            bad = np.flatnonzero(~np.isfinite(np.frombuffer(raw, BAD[part.dtype][0])))
        assert one.bad == Tally(bad.size, int(bad[0]) if bad.size else -1), part


def test_files_are_read_once_and_from_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Large reads go past the page cache whatever lies in it; it is not even asked."""

    def ask(*arguments: object) -> float:
        raise AssertionError("the page cache was asked")

    monkeypatch.setattr("streammerge.io.local_file.cached_share", ask)
    read: list[int] = []
    real = Reader.read_slot

    def count(self: Reader, path: str, offset: int, nbytes: int, *arguments: object, **options: bool) -> int:
        read.append(nbytes)
        return real(self, path, offset, nbytes, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Reader, "read_slot", count)
    (tmp_path / "file").write_bytes(bytes(20 << 20))
    parts = [Part("", 0, 100), Part("w", 100, (20 << 20) - 100, "BF16")]
    read_back({str(tmp_path / "file"): parts})
    assert sum(read) == 20 << 20
