"""The CRC-32 of a library that multiplies without carries is zlib's, for every length, alignment and start."""

import zlib

import numpy as np

from streammerge.numerics.crc32 import combine, combine_all, crc32

BYTES = np.random.default_rng(0).integers(0, 256, 70_000, np.uint8)


def test_it_is_zlibs_at_every_short_length_and_alignment() -> None:
    for start in range(17):
        for length in range(300):
            piece = BYTES[start : start + length]
            assert crc32(piece, start) == zlib.crc32(piece, start)


def test_it_is_zlibs_for_long_data_of_every_kind_of_buffer() -> None:
    for length in (4095, 4097, 65_521, 70_000):
        for piece in (BYTES[:length], BYTES[:length].tobytes(), memoryview(BYTES)[70_000 - length :]):
            assert crc32(piece) == zlib.crc32(piece)
    assert crc32(np.zeros(1 << 16, np.uint8), 0xFFFFFFFF) == zlib.crc32(bytes(1 << 16), 0xFFFFFFFF)


def test_pieces_combine_to_the_whole() -> None:
    whole = crc32(BYTES)
    for cut in (0, 1, 1234, 69_999, 70_000):
        first, second = BYTES[:cut], BYTES[cut:]
        assert crc32(second, crc32(first)) == whole
        assert combine(crc32(first), crc32(second), second.size) == whole
    parts = np.split(BYTES, [7, 4096, 4096, 50_001])
    assert combine_all((crc32(part), part.size) for part in parts) == whole
