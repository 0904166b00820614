"""How a method asks for statistics: `yield from ask(statistic)` gives the value, with its type.

A method with statistics is a generator. It yields lists of statistics, one list a round, and is sent the list of their
values; `ask` and `ask_all` are rounds of one statistic and of several of one kind.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, TypeVar, cast

from streammerge.statistics.base import A, Statistic

R = TypeVar("R")

Steps = Generator[list[Statistic[Any]], list[Any], R]
"""The rounds of a method, which end in R: a rule, or task vectors on the way to one."""


def ask(statistic: Statistic[A]) -> Steps[A]:
    """Ask for one statistic.

    >>> def steps():
    ...     total = yield from ask(AbsSum(TaskVector(0)))  # doctest: +SKIP
    """
    return (yield from ask_all([statistic]))[0]


def ask_all(statistics: Sequence[Statistic[A]]) -> Steps[list[A]]:
    """Ask for several statistics in one round: one pass over the data answers all of them."""
    return cast(list[A], (yield list(statistics)))
