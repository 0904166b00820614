"""How a method asks for statistics: `yield from ask(statistic)` returns the typed value.

A method with statistics is a generator. It yields lists of statistics, one list per round, and is sent the list of
their values. `ask` is a round of one statistic, `ask_all` a round of several of the same kind.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, TypeVar, cast

from streammerge.statistics.base import A, Statistic

R = TypeVar("R")

Steps = Generator[list[Statistic[Any]], list[Any], R]
"""The rounds of a method, which return R: a rule, or task vectors to build one from."""


def ask(statistic: Statistic[A]) -> Steps[A]:
    """Ask for one statistic.

    >>> def steps():
    ...     total = yield from ask(AbsSum(TaskVector(0)))  # doctest: +SKIP
    """
    return (yield from ask_all([statistic]))[0]


def ask_all(statistics: Sequence[Statistic[A]]) -> Steps[list[A]]:
    """Ask for several statistics in one round, which share the passes over the data."""
    return cast(list[A], (yield list(statistics)))


def follow(steps: Steps[R], answers: Sequence[Sequence[Any]]) -> R | list[Statistic[Any]]:
    """Return what comes after the answers to the first rounds: the statistics of the next round, or the result."""
    try:
        wanted = next(steps)
        for known in answers:
            wanted = steps.send(list(known))
    except StopIteration as stop:
        result: R = stop.value
        return result
    steps.close()
    return wanted
