"""exp and log built from IEEE additions, multiplications and divisions only.

The functions of libraries differ in the last bit between CPU and GPU, and between CPUs; these do not. They work in fp64
with an error of one or two units in the last place. ``kernels/elementary.py`` compiles the same steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LEAST = -700.0
"""Arguments below this are clamped to it; exp is 1e-304 there."""
SHIFT = 1.5 * 2.0**52
"""Adding and subtracting this rounds to an integer; after the addition the low bits hold that integer."""
SHIFT_BITS = 0x4338000000000000
PER_LN2 = 1.4426950408889634
LN2_HIGH = 0.693147180369123816490
"""The leading 32 bits of ln 2, so that its small multiples are exact."""
LN2_LOW = 1.90821492927058770002e-10
"""The rest of ln 2."""
EXP_TERMS = tuple(
    1.0 / f
    for f in (
        6227020800,
        479001600,
        39916800,
        3628800,
        362880,
        40320,
        5040,
        720,
        120,
        24,
        6,
        2,
        1,
        1,
    )
)
"""1/13! ... 1/1!, 1/0!: sufficient for abs(r) <= ln(2) / 2."""
ROOT_HALF_BITS = 0x3FE6A09E667F3BCD
"""sqrt(1/2): mantissas lie between it and twice it."""
LOG_TERMS = tuple(1.0 / k for k in range(23, 0, -2))
"""1/23 ... 1/3, 1/1: log m = 2 f (1 + f^2/3 + f^4/5 ...), f = (m - 1) / (m + 1), abs(f) <= 0.1716."""


def exp(x: torch.Tensor) -> torch.Tensor:
    """Return e to the power of `x`, fp64 and not above 0."""
    import torch

    x = x.clamp(min=LEAST)
    shifted = x * PER_LN2 + SHIFT
    k = shifted - SHIFT
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    total = torch.full_like(r, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        total = total * r + term
    power = (shifted.view(torch.int64) - SHIFT_BITS + 1023) << 52
    return total * power.view(torch.float64)


def log(y: torch.Tensor) -> torch.Tensor:
    """Return the natural logarithm of `y`, fp64, normal and positive."""
    import torch

    bits = y.view(torch.int64)
    exponent = (bits - ROOT_HALF_BITS) >> 52
    m = (bits - (exponent << 52)).view(torch.float64)
    f = (m - 1.0) / (m + 1.0)
    s = f * f
    total = torch.full_like(s, LOG_TERMS[0])
    for term in LOG_TERMS[1:]:
        total = total * s + term
    k = exponent.double()
    return k * LN2_HIGH + ((2.0 * f) * total + k * LN2_LOW)


def lane_sums(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of each row, fp64, in a fixed order: eight sequential lanes, then pairwise."""
    import torch

    lanes = rows.new_zeros(len(rows), 8)
    for start in range(0, rows.shape[1], 8):
        eight = rows[:, start : start + 8]
        if eight.shape[1] < 8:
            eight = torch.nn.functional.pad(eight, (0, 8 - eight.shape[1]))
        lanes = lanes + eight
    a, b, c, d, e, f, g, h = lanes.unbind(1)
    return ((a + b) + (c + d)) + ((e + f) + (g + h))
