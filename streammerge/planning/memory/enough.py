"""Make a refusal of ``--memory`` ask for what suffices for all that a command does: stages, points of a sweep, a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from streammerge.errors import BudgetError, InputError
from streammerge.planning.memory.budget import MIB
from streammerge.units import format_at_least

T = TypeVar("T")
M = TypeVar("M")

_GIVE_UP = 512 * MIB
"""The steps beyond what was asked for double up to this."""
MORE = " (what comes after it needs more)"
"""The remark on a number that is larger than that of the part which was refused first."""


def with_enough(decide: Callable[[M | int], T], memory: M) -> T:
    """Return ``decide(memory)``; where that is refused, find the memory that suffices by deciding again with more.

    Parameters
    ----------
    decide
        Plans all that a command does from headers, in so many bytes (None: half of what is available).

    Raises
    ------
    BudgetError
        The first refusal. The memory that it asks for suffices.
    """
    try:
        return decide(memory)
    except BudgetError as error:
        raise asking_enough(error, decide) from None


def asking_enough(error: BudgetError, decide: Callable[[int], object]) -> BudgetError:
    """Return a refusal that asks for the memory that suffices for `decide`, as `with_enough` does."""
    if error.least is None:
        return error
    return _asking_for(error, error.least, _enough(decide, error.least))


def _enough(decide: Callable[[int], object], known: int) -> int:
    """Return memory with which `decide` raises no refusal that asks for more, in whole MiB; `known` are needed.

    If `decide` refuses again and again what it has asked for, `known` is returned: more memory would not help.
    """
    total, step = _whole(known), MIB
    while step < _GIVE_UP:
        try:
            decide(total)
        except BudgetError as error:
            if error.least is None:
                return total
            if error.least > total:
                total = _whole(error.least)
            else:
                total, step = total + step, 2 * step
        except InputError:  # more memory does not help
            return total
        else:
            return total
    return known


def _whole(nbytes: int) -> int:
    return -(-nbytes // MIB) * MIB


def _asking_for(error: BudgetError, known: int, least: int) -> BudgetError:
    """Return a refusal that asks for `least` bytes where it asked for those `known` to its own part."""
    asked, enough = format_at_least(known), format_at_least(least)
    if enough == asked:
        return error
    before, _, after = str(error).rpartition(asked)
    return BudgetError(f"{before}{enough}{MORE}{after}", least)
