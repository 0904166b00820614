"""Codes and scales as the formats store them, and their values in fp64, written from the specifications alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Entry = tuple[str, list[int], bytes]
"""Dtype, shape and bytes of a tensor in a file."""


def float_table(exponent_bits: int, mantissa_bits: int, bias: int) -> Values:
    """Return the values of all codes of a small float: sign, exponent, mantissa; special codes not told apart."""
    codes = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    mantissa = codes & ((1 << mantissa_bits) - 1)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = np.where(codes >> (exponent_bits + mantissa_bits), -1.0, 1.0)
    steps = np.where(exponent > 0, mantissa + (1 << mantissa_bits), mantissa)
    return sign * steps * 2.0 ** (np.maximum(exponent, 1) - bias - mantissa_bits)


E2M1 = float_table(2, 1, 1)
E4M3 = float_table(4, 3, 7)
E4M3[[0x7F, 0xFF]] = np.nan
E5M2 = float_table(5, 2, 15)
E5M2[[0x7C, 0xFC]] = np.inf, -np.inf
E5M2[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] = np.nan
E8M0 = 2.0 ** (np.arange(256) - 127.0)
E8M0[255] = np.nan
TABLES = {"F8_E4M3": E4M3, "F8_E5M2": E5M2, "F8_E8M0": E8M0, "U8": E8M0}
"""Values of the one-byte codes that scales and weights come in; U8 scales are E8M0."""


def bytes_of(codes: NDArray[np.integer], dtype: str) -> Entry:
    """Return codes of one byte as a tensor."""
    return dtype, list(codes.shape), (codes & 0xFF).astype(np.uint8).tobytes()


def words_of(words: NDArray[np.integer], dtype: str = "I32") -> Entry:
    """Return integers of 32 or 64 bits as a tensor."""
    kind = "<i8" if dtype == "I64" else "<i4"
    return dtype, list(words.shape), words.astype(kind).tobytes()


def floats_of(values: NDArray[np.floating], dtype: str) -> tuple[Entry, Values]:
    """Return values as a tensor of a float dtype, and what they are once stored; bf16 by truncation."""
    if dtype == "BF16":
        patterns = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        stored = (patterns.astype(np.uint32) << 16).view(np.float32)
        return (dtype, list(values.shape), patterns.tobytes()), stored.astype(np.float64)
    stored = values.astype({"F32": np.float32, "F16": np.float16}[dtype])
    return (dtype, list(values.shape), stored.tobytes()), stored.astype(np.float64)


def scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> tuple[Entry, Values]:
    """Return random scales around 1/64 in a dtype, and their values."""
    if dtype in ("F8_E8M0", "U8"):
        codes = rng.integers(116, 124, shape)
        return bytes_of(codes, dtype), E8M0[codes]
    if dtype == "F8_E4M3":
        codes = rng.integers(0x18, 0x70, shape)
        return bytes_of(codes, dtype), E4M3[codes]
    return floats_of(rng.uniform(0.004, 0.03, shape), dtype)


def finite_codes(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> NDArray[np.int64]:
    """Return random FP8 codes, of numbers only, every size among them."""
    numbers = np.flatnonzero(np.isfinite(TABLES[dtype]))
    return rng.choice(numbers, shape)


def nibbles(codes: NDArray[np.integer], high_first: bool = False) -> NDArray[np.uint8]:
    """Return 4-bit codes two to a byte along the last axis, the first in the low nibble unless said otherwise."""
    first, second = codes[..., 0::2], codes[..., 1::2]
    low, high = (second, first) if high_first else (first, second)
    return (low | (high << 4)).astype(np.uint8)


def dense_words(codes: NDArray[np.integer], bits: int) -> NDArray[np.int32]:
    """Return unsigned codes of a few bits as words along the last axis: element c at bit c * bits, little endian.

    Zeros fill the last word. An element may lie in two words.
    """
    planes = (codes[..., None] >> np.arange(bits)) & 1
    stream = planes.reshape(*codes.shape[:-1], -1).astype(np.uint8)
    padded = np.concatenate(
        [stream, np.zeros((*stream.shape[:-1], -stream.shape[-1] % 32), np.uint8)], axis=-1
    )
    return np.packbits(padded, axis=-1, bitorder="little").view("<i4")


def over(values: Values, shape: tuple[int, ...], block: tuple[int, ...]) -> Values:
    """Return scales of blocks as one value for each element; blocks at the edges may be partial."""
    for axis, size in enumerate(block):
        values = np.repeat(values, size, axis=axis)
    return values[tuple(slice(n) for n in shape)]
