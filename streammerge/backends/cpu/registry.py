"""The rules and methods of `BlockMath` that compiled kernels implement, and the groups of kernels that each calls.

A group is compiled as a whole, before the first block that needs it, by running its examples. The code that calls the
kernels of a rule, or of a method of `BlockMath`, therefore declares their group and an example. A statistic declares only
its calls (`Statistic.calls`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from streammerge.algebra.block import Applied, BlockMath, Call, Operand
from streammerge.algebra.task_vectors import Cut, RankDrop, TaskVector
from streammerge.backends.cpu.memory import BlockMemory

Names = frozenset[str]
Apply = Callable[[BlockMemory, Any, Operand], Applied]
ApplyAll = Callable[[BlockMemory, Any, Sequence[Operand]], list[Applied]]
Example = Callable[[BlockMath], object]
_F = TypeVar("_F", bound=Callable[..., Any])
_E = TypeVar("_E", bound=Example)

VECTORS = tuple(TaskVector(i, drop=1 << 31, cut=Cut(1, "thin", 1 << 31)) for i in range(2))
RANKED = tuple(TaskVector(i, rank_drop=RankDrop(0.4, 0.2)) for i in range(2))
OUT = Operand(128, "BF16")
"""Task vectors of both models of the examples' block."""


class Implementation(NamedTuple):
    """A merge rule on the CPU."""

    apply: Apply
    kernels: Callable[[Any], Names]
    """Function that returns the groups that a rule of this class calls."""


_RULES: dict[type, Implementation] = {}
_SCALED: dict[type, ApplyAll] = {}
_CALLS: dict[str, Callable[[Any], Names]] = {}
_EXAMPLES: dict[str, list[Example]] = {}


def applies(
    *rules: type, kernels: str | Callable[[Any], Names]
) -> Callable[[Callable[[BlockMemory, Any, Operand], Applied]], Apply]:
    """Register the implementation of a class of rules, and the groups of kernels it calls (or a function of the rule)."""

    def register(function: Apply) -> Apply:
        for rule in rules:
            _RULES[rule] = Implementation(function, _names(kernels))
        return function

    return register


def scales(rule: type) -> Callable[[ApplyAll], ApplyAll]:
    """Register what applies several rules of a class that differ only in their scale, by the kernels of one of them."""

    def register(function: ApplyAll) -> ApplyAll:
        _SCALED[rule] = function
        return function

    return register


def scaled_implementation_of(rule: object) -> ApplyAll:
    """Return the implementation of several rules that differ only in their scale."""
    return _SCALED[type(rule)]


def answers(kernels: str | Callable[[Any], Names], *, call: str | None = None) -> Callable[[_F], _F]:
    """Register the groups of kernels that a method of `BlockMath` calls (or a function of its subject).

    `call` is the name that statistics use for it; default: the method's own.
    """

    def register(method: _F) -> _F:
        _CALLS[call or method.__name__] = _names(kernels)
        return method

    return register


def example(group: str) -> Callable[[_E], _E]:
    """Register an example that compiles kernels of a group by calling them with the types that merges use."""

    def register(function: _E) -> _E:
        _EXAMPLES.setdefault(group, []).append(function)
        return function

    return register


def _names(kernels: str | Callable[[Any], Names]) -> Callable[[Any], Names]:
    return (lambda subject: frozenset({kernels})) if isinstance(kernels, str) else kernels


def implementation_of(rule: object) -> Implementation | None:
    """Return the implementation of a rule; None if torch applies it."""
    return _RULES.get(type(rule))


def is_applied(rule: type) -> bool:
    """Return whether kernels apply rules of a class."""
    return rule in _RULES


def kernels_of_rule(rule: object) -> Names:
    """Return the groups of kernels that a rule calls."""
    found = implementation_of(rule)
    return frozenset() if found is None else found.kernels(rule)


def kernels_of_call(call: Call) -> Names:
    """Return the groups of kernels that a statistic's call needs."""
    return _CALLS[call.method](call.subject)


def groups() -> dict[str, list[Example]]:
    """Return the examples of every group of kernels, by its name."""
    return dict(_EXAMPLES)
