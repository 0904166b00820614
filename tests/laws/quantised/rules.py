"""The rules of rounding as they are written down, in plain numpy and torch, and the bytes that follow from them.

Every operation is a single fp32 operation. It shares nothing with what writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tests.checkpoint.quantized.numbers import dense_words, nibbles

Rule = Callable[..., dict[str, bytes]]
"""Returns the bytes of each part, by the end of its name, of values (rows, columns)."""
F32 = np.float32
Values = NDArray[np.float32]
TORCH = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
LEAST = {"F32": 2.0**-149, "BF16": 2.0**-133, "F16": 2.0**-24}


@dataclass(frozen=True)
class Raw:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def raw_tensors(path: Path) -> dict[str, Raw]:
    """Return the tensors of a safetensors file."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        first, last = (8 + size + offset for offset in entry["data_offsets"])
        found[name] = Raw(entry["dtype"], tuple(entry["shape"]), raw[first:last])
    return found


def as_bytes(values: NDArray[np.floating], dtype: str) -> bytes:
    """Return numbers that a dtype holds, or is to round, as its bytes; powers of two for dtypes of exponents."""
    if dtype in ("U8", "F8_E8M0"):
        return (np.log2(values.astype(np.float64)).astype(int) + 127).astype(np.uint8).tobytes()
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(TORCH[dtype])
    return bytes(rounded.reshape(-1).view(torch.uint8).numpy().tobytes())


def spread(grid: Values, block: tuple[int, int], shape: tuple[int, ...]) -> Values:
    """Return the entry of a grid that each element has."""
    wide = np.repeat(np.repeat(grid, block[0], 0), block[1], 1)
    return wide[: shape[0], : shape[1]]


def peaks(values: Values, block: tuple[int, int]) -> Values:
    """Return the largest magnitude of each block, partial ones too."""
    rows, columns = values.shape
    return np.array(
        [
            [np.abs(values[i : i + block[0], j : j + block[1]]).max() for j in range(0, columns, block[1])]
            for i in range(0, rows, block[0])
        ],
        F32,
    )


def _held(scales: Values, dtype: str) -> Values:
    held = torch.from_numpy(scales).to(TORCH[dtype]).float().numpy()
    return np.where(held == 0, F32(LEAST[dtype]), held)


def _as_f8(values: Values) -> Values:
    clamped = torch.from_numpy(values).clamp(-448, 448)
    return clamped.to(torch.float8_e4m3fn).float().numpy()


def integers(bits: int, dtype: str, block: tuple[int, int] | None, *, packed: bool) -> Rule:
    """Return the rule of symmetric integers of some bits."""

    def rule(values: Values, codes_end: str, scale_end: str) -> dict[str, bytes]:
        size = block or values.shape
        a = peaks(values, size)
        s = np.where(a == 0, F32(1), _held(a / F32(2 ** (bits - 1) - 0.5), dtype)).astype(F32)
        least = -(1 << (bits - 1))
        q = np.clip(np.rint(values / spread(s, size, values.shape)), least, -least - 1).astype(int)
        codes = dense_words(q - least, bits).tobytes() if packed else q.astype(np.int8).tobytes()
        return {codes_end: codes, scale_end: as_bytes(s, dtype)}

    return rule


def nearest_f4(values: Values) -> NDArray[np.int64]:
    """Return the E2M1 codes of values, rounded to nearest even and saturated, found among all of them."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    distance = np.abs(np.abs(values.astype(np.float64))[..., None] - table)
    even = distance + 1e-12 * (np.arange(8) % 2)  # of two as near, the even code
    return np.argmin(even, -1) + 8 * (values < 0)


def mxfp4(values: Values, codes_end: str, scale_end: str) -> dict[str, bytes]:
    """Return what MXFP4 stores, an exponent for each 32."""
    a = peaks(values, (1, 32))
    exponent = np.clip(np.floor(np.log2(np.where(a, a, 1).astype(np.float64))) - 2, -127, 127)
    s = np.where(a == 0, 1, np.exp2(exponent)).astype(F32)
    codes = nibbles(nearest_f4(values / spread(s, (1, 32), values.shape)))
    return {codes_end: codes.tobytes(), scale_end: as_bytes(s, "U8")}


def of_each_matrix(rule: Rule, *, turned: bool = False) -> Rule:
    """Return the rule of a tensor of several matrices, each stored by itself; `turned`: their rows as columns."""

    def every(values: Values, *ends: str) -> dict[str, bytes]:
        matrices = values.transpose(0, 2, 1) if turned else values
        found = [rule(np.ascontiguousarray(matrix), *ends) for matrix in matrices]
        return {end: b"".join(one[end] for one in found) for end in ends}

    return every


def nvfp4(*, divides: bool) -> Rule:
    """Return the rule of NVFP4, whose scale of the whole divides or multiplies."""

    def rule(values: Values, codes_end: str, scale_end: str, whole_end: str) -> dict[str, bytes]:
        largest, a = np.abs(values).max(), peaks(values, (1, 16))
        if divides:
            g = F32(2688) / largest
            s = _as_f8((a * g) / F32(6))
            q = (values * g) / spread(s, (1, 16), values.shape)
        else:
            g = largest / F32(2688)
            s = _as_f8((a / F32(6)) / g)
            q = values / spread(s * g, (1, 16), values.shape)
        whole = np.array([g], F32).tobytes()
        return {
            codes_end: nibbles(nearest_f4(q)).tobytes(),
            scale_end: as_bytes(s, "F8_E4M3"),
            whole_end: whole,
        }

    return rule


def fp8(dtype: str, block: tuple[int, int] | None, kind: str = "448") -> Rule:
    """Return the rule of FP8 with scales of a dtype for each block; None: for the whole tensor."""

    def rule(values: Values, codes_end: str, scale_end: str) -> dict[str, bytes]:
        size = block or values.shape
        a = peaks(values, size)
        if kind == "mx":
            s = np.exp2(
                np.clip(np.floor(np.log2(np.where(a, a, 1).astype(np.float64))) - 8, -127, 127)
            ).astype(F32)
        elif kind == "powers":
            s = np.exp2(
                np.clip(np.ceil(np.log2((np.where(a, a, 1) / F32(448)).astype(np.float64))), -127, 127)
            ).astype(F32)
        else:
            s = _held(a / F32(448), dtype)
        s = np.where(a == 0, F32(1), s).astype(F32)
        q = torch.from_numpy(values / spread(s, size, values.shape)).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {codes_end: q.view(torch.uint8).numpy().tobytes(), scale_end: as_bytes(s, dtype)}

    return rule
