"""Schedules for averaging checkpoints; each gives the coefficients of a weighted sum.

A schedule is a function, registered under its kind, that maps the number of checkpoints to their coefficients, oldest
first. Coefficients are computed exactly (`wsm` to 40 digits) and rounded once to fp64: they are equal on every machine.

Sources: PMA, https://arxiv.org/abs/2505.12082 (sma, wma, ema); WSM, https://arxiv.org/abs/2507.17634.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction

from streammerge.config.wording import check_keys, child, refuse, shown, suggestion
from streammerge.records import dataclass

Coefficients = Callable[[int, str], Sequence[Fraction]]
"""Function of the number of checkpoints (at least 1) and the decay; returns coefficients, oldest first, of sum 1."""
_DIGITS = 40
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494")


@dataclass(frozen=True)
class Kind:
    """A kind of schedule."""

    coefficients: Coefficients
    decay: str = ""
    """Description of its decay for messages; empty if it has none."""
    accepts: Callable[[str], bool] = lambda decay: decay == ""


KINDS: dict[str, Kind] = {}


@dataclass(frozen=True)
class Schedule:
    """A schedule as the config gives it."""

    kind: str = "sma"
    decay: str = ""
    """The decay as written: the number of `ema`, the function of `wsm`; empty for other kinds."""

    def __str__(self) -> str:
        return f"{self.kind}:{self.decay}" if self.decay else self.kind

    def coefficients(self, n: int) -> tuple[float, ...]:
        """Return the coefficients of `n` checkpoints, oldest first.

        >>> Schedule("wma").coefficients(3)
        (0.16666666666666666, 0.3333333333333333, 0.5)
        """
        return tuple(map(float, KINDS[self.kind].coefficients(n, self.decay)))


def _register(
    kind: str, decay: str = "", accepts: Callable[[str], bool] = lambda decay: decay == ""
) -> Callable[[Coefficients], Coefficients]:
    def register(function: Coefficients) -> Coefficients:
        KINDS[kind] = Kind(function, decay, accepts)
        return function

    return register


def parse_schedule(value: object, path: str) -> Schedule:
    """Return the schedule that a config writes as ``sma``, ``ema:0.9`` or ``{kind: ema, decay: 0.9}``.

    Raises
    ------
    ConfigError
        If there is no such schedule.
    """
    if isinstance(value, str):
        kind, colon, decay = value.partition(":")
        given = {"kind": kind, **({"decay": decay.strip()} if colon else {})}
    elif isinstance(value, dict):
        check_keys(value, path, ("kind", "decay"))
        if "kind" not in value:
            refuse(path, "'kind' is missing (write {kind: ema, decay: 0.9})")
        given = value
    else:
        refuse(path, f"must be one of {', '.join(KINDS)}, or a map {{kind, decay}}, not {shown(value)}")
    kind = given["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        refuse(path, f"no schedule {shown(kind)} ({suggestion(str(kind)[:60], KINDS)})")
    known = KINDS[kind]
    decay = given.get("decay", "")
    text = repr(decay) if isinstance(decay, float) else decay
    if not known.decay and text != "":
        refuse(child(path, "decay"), f"schedule {kind!r} has none")
    if not isinstance(text, str) or not known.accepts(text):
        what = "is missing" if text == "" else f"is not {shown(decay)}"
        refuse(child(path, "decay"), f"{what}: of {kind!r} it is {known.decay}")
    return Schedule(kind, text)


@_register("sma")
def _simple(n: int, decay: str) -> list[Fraction]:
    """Return the coefficients of the plain mean: 1 / n."""
    return [Fraction(1, n)] * n


@_register("wma")
def _weighted(n: int, decay: str) -> list[Fraction]:
    """Return 1, 2, 3, …, n divided by their sum."""
    return [Fraction(2 * i, n * (n + 1)) for i in range(1, n + 1)]


def _is_share(text: str) -> bool:
    plain = re.fullmatch(r"0?\.\d{1,30}|\d(\.\d{1,30})?e-\d{1,2}", text, re.ASCII)
    return plain is not None and 0 < Fraction(text) < 1


@_register("ema", "the weight of what was averaged before, a number between 0 and 1 such as 0.9", _is_share)
def _exponential(n: int, decay: str) -> list[Fraction]:
    """Return the coefficients of M_0 = W_0, M_i = d M_(i-1) + (1 - d) W_i."""
    d = Fraction(decay)
    return [d ** (n - 1), *((1 - d) * d ** (n - 1 - i) for i in range(1, n))]


def _cosine(x: Decimal) -> Decimal:
    """Return (1 + cos(pi x)) / 2 for x in [0, 1], from the sine of the half angle: 1 - sin(pi x / 2) ** 2."""
    angle = _PI * x / 2
    term = sine = angle
    for k in range(1, 40):
        term *= -angle * angle / (2 * k * (2 * k + 1))
        sine += term
    return 1 - sine * sine


_DECAYS: Mapping[str, Callable[[Decimal], Decimal]] = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - x.sqrt(),
    "cosine": _cosine,
}


@_register("wsm", f"the decay that it stands for: {', '.join(_DECAYS)}", lambda decay: decay in _DECAYS)
def _decayed(n: int, decay: str) -> list[Fraction]:
    """Return the coefficients equivalent to a decay f of the learning rate after the oldest checkpoint, the trunk.

    With m = n - 1 checkpoints after it and d_i = f(i / m): c_m = d_m, c_i = d_i - d_(i+1), c_0 = 1 - d_1. f(1) = 0, so
    the newest has the coefficient 0, as a learning rate that has decayed to 0 would leave it.
    """
    if n == 1:
        return [Fraction(1)]
    with localcontext() as context:
        context.prec = 2 * _DIGITS
        shares = [_DECAYS[decay](Decimal(i) / (n - 1)) for i in range(1, n)]
        d = [Fraction(1), *(Fraction(round(share, _DIGITS)) for share in shares)]
    return [*(d[i] - d[i + 1] for i in range(n - 1)), d[-1]]
