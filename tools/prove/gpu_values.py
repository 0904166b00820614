"""Blocks of values that betray a kernel that rounds, drops or orders otherwise, for the law of bits (`gpu_bits.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streammerge.algebra.block import Block, Operand, operand_bytes
from streammerge.algebra.task_vectors import TaskVector
from streammerge.backends.cpu.math import KernelMath
from streammerge.numerics.philox import RandomKeys

INFINITE = 0x7F800000


@dataclass(frozen=True)
class Mix:
    """The values and dtypes of a block."""

    kind: str
    base: str
    models: tuple[str, ...]
    out: str
    start: int = 0
    row: int = 0
    """Elements of a row; 0: one row."""

    def __str__(self) -> str:
        return f"{self.kind} {self.base} {'+'.join(self.models)} -> {self.out} from {self.start}"


MIXES = [
    Mix("normal", "BF16", ("BF16",) * 3, "BF16"),
    Mix("special", "BF16", ("BF16",) * 3, "BF16", 4099),
    Mix("coarse", "BF16", ("BF16",) * 4, "BF16", 5),
    Mix("tiny", "BF16", ("BF16",) * 3, "BF16", 2),
    Mix("bits", "BF16", ("BF16",) * 2, "BF16", 3),
    Mix("normal", "F16", ("F16",) * 3, "F16", 1),
    Mix("special", "F16", ("F16",) * 3, "F16", (1 << 34) + 3),
    Mix("tiny", "F16", ("F16",) * 3, "F16"),
    Mix("bits", "F16", ("F16",) * 3, "F16"),
    Mix("normal", "F32", ("F32",) * 3, "F32"),
    Mix("special", "F32", ("F32",) * 2, "F32", 6),
    Mix("tiny", "F32", ("F32",) * 3, "F32"),
    Mix("bits", "F32", ("F32",) * 3, "F32"),
    Mix("normal", "F32", ("BF16", "F16", "F32"), "BF16", 7),
    Mix("special", "BF16", ("F32", "BF16"), "F16"),
    Mix("same", "F32", ("F32",) * 2, "F32", 1),
    Mix("same", "BF16", ("BF16",) * 4, "BF16", 9),
    Mix("coarse", "F16", ("BF16",), "F32"),
    Mix("midpoint", "F32", ("F32",) * 3, "BF16"),
    Mix("midpoint", "F32", ("F32",) * 3, "F16", 3),
    Mix("zeros", "F32", ("F32",) * 3, "F32", 2),
    Mix("zeros", "BF16", ("BF16",) * 2, "BF16"),
]
FEW = [1, 2, 7, 13, 11, 15, 20, 18]
"""The mixes that CI compares: between them all dtypes and all kinds of values, and so those at even and at odd places."""


# --- values


def _bits_of(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return values of fp32 as bytes of a dtype; bf16 is truncated."""
    if dtype == "F32":
        return values.astype(np.float32).view(np.uint8)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint8)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def _values(
    rng: np.random.Generator, n: int, dtype: str, mix: Mix, base: np.ndarray | None, model: int = 0
) -> np.ndarray:
    """Return the bytes of one operand."""
    if mix.kind == "bits":
        return rng.integers(0, 256, n * operand_bytes(Operand(0, dtype), 1), dtype=np.uint8)
    x = rng.standard_normal(n).astype(np.float32)
    if mix.kind == "tiny":  # denormal
        x *= np.float32(1e-7 if dtype == "F16" else 1e-39)
    elif mix.kind == "coarse":  # many ties, cancellations and zeros
        x = np.round(x * 2) / 2
    elif mix.kind == "zeros":
        x = rng.choice(np.array([0.0, -0.0, 1.0, -1.0, 0.5], np.float32), n)
    elif base is not None and mix.kind == "midpoint":
        # The middle between two bf16 or fp16 numbers in one model, and less than fp32 can add to it in the others.
        step = 2.0**-8 if mix.out == "BF16" else 2.0**-11
        x = (1 + step * (rng.integers(0, 100, n) + 0.5)).astype(np.float32)
        if model:
            x = rng.choice(np.array([0, 2.0**-35, -(2.0**-35)], np.float32), n)
    elif base is not None:
        x = base + np.float32(0.01) * x
        x[rng.random(n) < 0.1] = base[0]  # zeros, and ties
    if mix.kind == "special":
        for value in (np.nan, np.inf, -np.inf):
            x[rng.random(n) < 0.02] = value
    return _bits_of(x, dtype)


def block_of(mix: Mix, n: int, seed: int) -> tuple[Block, Operand]:
    """Return a block with Fisher diagonals, and its output's place."""
    rng = np.random.default_rng([seed, n, len(mix.models), *mix.kind.encode(), *mix.base.encode()])
    base = rng.standard_normal(n).astype(np.float32)
    if mix.kind == "midpoint":
        base[:] = 0
    first = _bits_of(base, mix.base) if mix.kind in ("normal", "special", "midpoint", "same") else None
    parts = [_values(rng, n, mix.base, mix, None) if first is None else first]
    near = base if mix.kind in ("normal", "special", "midpoint", "same") else None
    parts += [_values(rng, n, dtype, mix, near, model) for model, dtype in enumerate(mix.models)]
    if mix.kind == "same":
        parts[2:] = [parts[1]] * (len(mix.models) - 1)
    dtypes = [mix.base, *mix.models]
    for i, dtype in enumerate(mix.models):
        fisher = rng.standard_normal(n).astype(np.float32) ** 2
        fisher[rng.random(n) < 0.3] = 0.0
        fisher[rng.random(n) < 0.01 * (i == 0)] = -1.0
        parts.append(_bits_of(fisher, dtype))
    dtypes += mix.models
    offsets = np.cumsum([0, *(-(-part.size // 64) * 64 for part in parts)]).tolist()
    buffer = np.zeros(offsets[-1] + -(-4 * n // 64) * 64, np.uint8)
    for part, offset in zip(parts, offsets, strict=False):
        buffer[offset : offset + part.size] = part
    operands = [Operand(offset, dtype) for offset, dtype in zip(offsets, dtypes, strict=False)]
    k, row = len(mix.models), mix.row or n
    keys = RandomKeys(7, tuple(f"m{i}" for i in range(k)))
    models, fishers = tuple(operands[1 : 1 + k]), tuple(operands[1 + k :])
    block = Block(buffer, models, operands[0], "w", mix.start, n, (n // row, row), keys, fishers)
    return block, Operand(offsets[-1], mix.out)


def middle_key(block: Block, model: int, share: float) -> int:
    """Return the magnitude pattern of a model's task vector above which about `share` of the finite ones lie."""
    bins = np.zeros(1 << 16, np.int32)
    KernelMath(block).count_keys(TaskVector(model), 0, (1 << 31) - 1, 15, bins)
    finite = bins[: INFINITE >> 15]
    from_top = np.cumsum(finite[::-1])
    place = len(finite) - 1 - int(np.searchsorted(from_top, max(1, share * from_top[-1])))
    exact = np.zeros(1 << 15, np.int32)
    KernelMath(block).count_keys(TaskVector(model), place << 15, ((place + 1) << 15) - 1, 0, exact)
    return (place << 15) + int(np.argmax(exact)) if exact.any() else 5
