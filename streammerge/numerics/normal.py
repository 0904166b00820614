"""Random numbers of a normal distribution, from the words of `streammerge.numerics.philox`.

The quantile function of Wichura, "Algorithm AS 241: the percentage points of the normal distribution", Applied
Statistics 37 (1988), with a relative error below 1e-15. It consists of additions, multiplications, divisions, square
roots and the logarithm of `streammerge.numerics.elementary`, so that its bits do not depend on the machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.numerics.elementary import log

if TYPE_CHECKING:
    import torch

_CENTRE = (
    (
        2.5090809287301226727e3,
        3.3430575583588128105e4,
        6.7265770927008700853e4,
        4.5921953931549871457e4,
        1.3731693765509461125e4,
        1.9715909503065514427e3,
        1.3314166789178437745e2,
        3.3871328727963666080e0,
    ),
    (
        5.2264952788528545610e3,
        2.8729085735721942674e4,
        3.9307895800092710610e4,
        2.1213794301586595867e4,
        5.3941960214247511077e3,
        6.8718700749205790830e2,
        4.2313330701600911252e1,
        1.0,
    ),
)
"""Coefficients of numerator and denominator for probabilities from 0.075 to 0.925, highest power first."""
_MIDDLE = (
    (
        7.74545014278341407640e-4,
        2.27238449892691845833e-2,
        2.41780725177450611770e-1,
        1.27045825245236838258e0,
        3.64784832476320460504e0,
        5.76949722146069140550e0,
        4.63033784615654529590e0,
        1.42343711074968357734e0,
    ),
    (
        1.05075007164441684324e-9,
        5.47593808499534494600e-4,
        1.51986665636164571966e-2,
        1.48103976427480074590e-1,
        6.89767334985100004550e-1,
        1.67638483018380384940e0,
        2.05319162663775882187e0,
        1.0,
    ),
)
"""The same for tails down to exp(-25), which is less than half a word."""


def normal_of(words: torch.Tensor) -> torch.Tensor:
    """Return a standard normal number, fp64, for each random word, int64 from 0 to 2**32 - 1."""
    p = uniform_of(words)
    q = p - 0.5
    r = 0.180625 - q * q
    centre = q * _ratio(r, _CENTRE)
    tail = (-log(p.minimum(1.0 - p))).sqrt() - 1.6
    outer = _ratio(tail, _MIDDLE)
    return centre.where(q.abs() <= 0.425, outer.where(q > 0, -outer))


def uniform_of(words: torch.Tensor) -> torch.Tensor:
    """Return a number between 0 and 1, fp64, neither included, for each random word."""
    return (words.double() + 0.5) * 2.0**-32


def _ratio(x: torch.Tensor, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> torch.Tensor:
    above, below = (_polynomial(x, one) for one in coefficients)
    return above / below


def _polynomial(x: torch.Tensor, coefficients: tuple[float, ...]) -> torch.Tensor:
    total = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        total = total * x + coefficient
    return total
