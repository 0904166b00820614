"""Small integers out of the words that they are packed in, and the values they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from streammerge.numerics.casts import Floats, from_bf16, table

Codes = NDArray[np.uint8]


def unpacked(raw: NDArray[np.uint8], bits: int, first: int, n: int) -> Codes:
    """Return `n` integers of each line of bytes: integer c at bit ``c * bits``, little endian.

    Parameters
    ----------
    raw
        [lines, bytes], from the byte on that integer `first` begins in.
    bits
        At most 8; an integer may lie in two bytes.
    first
        The place of the first one in its line.

    >>> unpacked(np.array([[0x21, 0x43]], np.uint8), 4, 0, 4).tolist()
    [[1, 2, 3, 4]]
    """
    lines = raw.shape[0]
    mask = np.uint8((1 << bits) - 1)
    if bits == 8:
        return raw[:, :n]
    if 8 % bits == 0:
        each = 8 // bits
        out = np.empty((lines, raw.shape[1], each), np.uint8)
        for place in range(each):
            np.right_shift(raw, np.uint8(place * bits), out=out[:, :, place])
        out &= mask
        skip = first % each
        return out.reshape(lines, -1)[:, skip : skip + n]
    starts = np.arange(first, first + n) * bits
    places = starts // 8 - starts[0] // 8
    shifts = (starts % 8).astype(np.uint16)
    padded = np.pad(raw, ((0, 0), (0, 1))).astype(np.uint16)
    pairs = padded[:, places] | (padded[:, places + 1] << np.uint16(8))
    return ((pairs >> shifts) & np.uint16(mask)).astype(np.uint8)


def unpacked_rows(words: NDArray[np.uint32], bits: int, first: int, n: int) -> Codes:
    """Return `n` rows of integers that are packed along the rows, [n, columns].

    Parameters
    ----------
    words
        [words, columns], from the word on that row `first` begins in.
    bits
        At most 8; an integer may lie in two words.
    """
    starts = np.arange(first, first + n) * bits
    places = starts // 32 - starts[0] // 32
    shifts = (starts % 32).astype(np.uint32)[:, None]
    found = words[places] >> shifts
    split = np.flatnonzero(starts % 32 + bits > 32)
    if split.size:
        found[split] |= words[places[split] + 1] << (np.uint32(32) - shifts[split])
    return (found & np.uint32((1 << bits) - 1)).astype(np.uint8)


def reordered(codes: Floats, order: Sequence[int]) -> Floats:
    """Return whole words of integers in the order of their columns: column c of a word is where `order` says."""
    lines = codes.shape[0]
    return codes.reshape(lines, -1, len(order))[:, :, list(order)].reshape(lines, -1)


def steps_of(raw: NDArray[np.uint8], bits: int, first: int, n: int, offset: int) -> NDArray[np.float32]:
    """Return `n` integers of each line of bytes in fp32, their offset added; arguments are those of `unpacked`.

    Integers of 4 bits come through a table of both values of a byte, those of 8 through one of 256.
    """
    if bits == 4:
        both = np.take(_pairs(offset), raw).view(np.float32)
        return both[:, first % 2 : first % 2 + n]
    if bits == 8:
        return np.take(_bytes(offset), raw[:, :n])
    steps = unpacked(raw, bits, first, n).astype(np.float32)
    steps += np.float32(offset)
    return steps


@lru_cache(maxsize=64)
def _pairs(offset: int) -> NDArray[np.uint64]:
    """Return the values of the low and the high half of each byte, two of fp32 in one word."""
    codes = np.arange(256)
    halves = np.stack([codes & 15, codes >> 4], axis=1) + offset
    return halves.astype("<f4").view("<u8").reshape(-1)


@lru_cache(maxsize=64)
def _bytes(offset: int) -> NDArray[np.float32]:
    """Return the value of each byte; an offset of 256 stands for two's complements."""
    codes = np.arange(256)
    return (codes.astype(np.int8) if offset == SIGNED else codes + offset).astype(np.float32)


SIGNED = 256
"""The offset of bytes that are two's complements."""


def pairs_of(raw: NDArray[np.uint8], *, high_first: bool) -> Codes:
    """Return the two codes of 4 bits of each byte, one after the other.

    >>> pairs_of(np.array([0x21], np.uint8), high_first=False).tolist()
    [1, 2]
    """
    out = np.empty((raw.size, 2), np.uint8)
    np.bitwise_and(raw, np.uint8(15), out=out[:, int(high_first)])
    np.right_shift(raw, np.uint8(4), out=out[:, int(not high_first)])
    return out.reshape(-1)


E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""The value of each code."""


@lru_cache(maxsize=64)
def products_of_e4m3(factor: float, divides: bool) -> NDArray[np.float32]:
    """Return ``code * scale * factor`` of E2M1 codes and F8_E4M3 scales, rounded once to fp32; `divides`: over factor.

    Element ``scale << 4 | code``. A product has 30 bits, so fp64 holds it; a quotient of 6 bits and 24 lies too far
    from the middle between two numbers of fp32 to be rounded wrongly by way of fp64.
    """
    scales = from_bf16(table("F8_E4M3")).astype(np.float64)
    exact = np.multiply.outer(scales, E2M1)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = exact / factor if divides else exact * factor
        return exact.astype(np.float32).reshape(-1)
