"""The registry of merge methods: what each declares, and how users add their own.

Three kinds of function may be registered, told apart by their signature:

* ``f(models, base, *, parameters...) -> Tensor``: a plain torch formula of the pieces; with a keyword-only argument
  `context` it is told which tensor they belong to;
* ``f(context, *, parameters...) -> Rule``: chooses a rule, needs no statistics;
* a generator of the second kind that yields lists of statistics and is sent the answers.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from streammerge.algebra.extent import Extent
from streammerge.algebra.rules import Formula, Rule, removing
from streammerge.errors import ConfigError, InputError, blamed_on, printable
from streammerge.methods.drop import GENERAL, DropNames
from streammerge.methods.other_names import method_meant
from streammerge.methods.parameters import (
    CONTEXT,
    REQUIRED,
    Parameter,
    PerModel,
    declared,
    drop_parameters,
    per_model,
)
from streammerge.methods.sources import digest, imported_files, own_digest
from streammerge.methods.tensor_context import TensorContext
from streammerge.statistics.asking import Steps
from streammerge.statistics.base import Statistic

__all__ = [
    "REQUIRED",
    "Base",
    "Method",
    "Parameter",
    "PerModel",
    "all_methods",
    "get_method",
    "method",
    "per_model",
]

Base = Literal["required", "optional", "member", "template", "none"]
"""What a method does with ``base_model``.

`required`, `optional`: task vectors are differences from it. `member`: it is one more model, listed or not.
`template`: the arithmetic has no base; the base gives its config, its tokenizer and the tensors that are copied.
`none`: a config that names one is refused. A drop before the method needs a base in every case.
"""


Workspace = int | Callable[[TensorContext], int]
"""Bytes per element of a piece, or a function that returns the bytes for any piece of a tensor."""


@dataclass(frozen=True)
class Method:
    """A registered method: its function and everything the planner must know about it."""

    name: str
    function: Callable[..., Any]
    access: Extent
    """The most the method may need; `passes` tells what a given choice of parameters does need."""
    base: Base
    n_models: tuple[int, int | None]
    parameters: Mapping[str, Parameter]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    drop: DropNames = GENERAL
    """The names under which it takes a drop before it."""
    fisher: bool = False
    """Whether each model comes with a Fisher diagonal."""
    gram: bool = False
    """Whether each model comes with Gram matrices."""
    workspace: Workspace = 0
    """Bytes that a formula holds at once beyond what every formula may."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """mergekit's parameters without numeric effect here, each with the reason."""
    paper: str = ""
    origin: str = "built in"
    text: str = ""
    """What it does, for people."""

    @property
    def summary(self) -> str:
        """The first line of what it does."""
        return self.text.split("\n", 1)[0]

    @property
    def fingerprint(self) -> str:
        """The name of a built-in method; with a digest of the source for a user's."""
        if self.origin == "built in":
            return self.name
        package = DISTRIBUTIONS.get(self.function.__module__.partition(".")[0], "")
        return " ".join(filter(None, (self.name, own_digest(self.function), package)))

    @property
    def identity(self) -> dict[str, str]:
        """What the method's code depends on, by name: itself, and every local module that a user's imports."""
        if self.origin == "built in":
            return {"method": self.fingerprint}
        modules = {
            f"method module {name}": digest(path.read_bytes())
            for name, path in imported_files(self.function).items()
        }
        return {"method": self.fingerprint, **modules}

    @cached_property
    def known_rules(self) -> dict[tuple[object, ...], type[Rule]]:
        """The classes of rules that it is known to choose, by what jobs share; filled by the planner."""
        return {}

    @cached_property
    def is_formula(self) -> bool:
        """Whether the function is a plain formula of tensors."""
        return "models" in inspect.signature(self.function).parameters

    @cached_property
    def takes_context(self) -> bool:
        """Whether a plain formula wants to know which tensor it is given."""
        return self.is_formula and CONTEXT in inspect.signature(self.function).parameters

    @property
    def looks_at_names(self) -> bool:
        """Whether what it asks for may differ from tensor to tensor even with the same parameters."""
        return not self.is_formula and self.origin != "built in"

    def workspace_bytes(self, context: TensorContext, n: int) -> int:
        """Return the bytes that it declares for a piece of `n` elements of a tensor.

        Raises
        ------
        InputError
            If what it declares is no number of bytes.
        """
        if not callable(self.workspace):
            return self.workspace * n
        with blamed_on(self.name, context.name):
            nbytes = self.workspace(context)
        if not isinstance(nbytes, int) or nbytes < 0:
            raise InputError(
                f"method {printable(self.name)!r}: workspace(context) returned {printable(nbytes)} for tensor "
                f"{printable(context.name)}; return a number of bytes, an int of 0 or more"
            )
        return nbytes

    def start(
        self, context: TensorContext, parameters: Mapping[str, Any], answers: Sequence[Sequence[Any]]
    ) -> Rule | list[Statistic[Any]]:
        """Follow the method through the `answers` known so far; return what it wants next, or its rule."""
        if self.origin == "built in":
            return _follow(self._steps(context, parameters), answers)
        with blamed_on(self.name, context.name):
            return _follow(self._steps(context, parameters), answers)

    def _steps(self, context: TensorContext, parameters: Mapping[str, Any]) -> Steps[Rule]:
        """Drop first, where that is asked for; then the method itself."""
        own = dict(parameters)
        drop = self.drop.take(own)
        if drop is not None:
            dropped = tuple((yield from drop.steps()))
            context = replace(context, dropped=dropped, rescaled_by_norm=drop.rescale == "l1")
        keywords = {self.parameters[name].python_name: value for name, value in own.items()}
        if self.is_formula:
            if self.takes_context:
                keywords[CONTEXT] = context
            return Formula(self.function, keywords, context.dropped, self.name)
        result: Any = self.function(context, **keywords)
        return (yield from result) if inspect.isgenerator(result) else result

    def drops(self, parameters: Mapping[str, Any]) -> bool:
        """Return whether these parameters put a drop before the method."""
        return self.drop.wanted_by(parameters)

    def draws(self, context: TensorContext, parameters: Mapping[str, Any]) -> bool:
        """Return whether these parameters make each model draw random words of its own."""
        rule = self.rule(context, parameters)
        return any(vector.is_random and not vector.shared for vector in removing(rule))

    def sees(self, context: TensorContext, parameters: Mapping[str, Any]) -> Extent:
        """Return what arithmetic with these parameters must have before it at once."""
        if self.is_formula:
            by_access: dict[Extent, Extent] = {Extent.ELEMENT: Extent.ELEMENT, Extent.ROW: Extent.ROW}
            return by_access.get(self.access, Extent.TENSOR)
        return self.rule(context, parameters).extent

    def rule(self, context: TensorContext, parameters: Mapping[str, Any]) -> Rule:
        """Return the rule that placeholder answers lead to."""
        answers = [[statistic.placeholder() for statistic in one] for one in self.rounds(context, parameters)]
        rule = self.start(context, parameters, answers)
        assert not isinstance(rule, list)
        return rule

    def rounds(self, context: TensorContext, parameters: Mapping[str, Any]) -> list[list[Statistic[Any]]]:
        """Return the statistics of each round, following the method with placeholder answers."""
        answers: list[list[Any]] = []
        rounds: list[list[Statistic[Any]]] = []
        while isinstance(wanted := self.start(context, parameters, answers), list):
            rounds.append(wanted)
            answers.append([statistic.placeholder() for statistic in wanted])
        return rounds

    def access_with(self, context: TensorContext, parameters: Mapping[str, Any]) -> Extent:
        """Return the access these parameters need."""
        if self.is_formula:
            return self.access
        extents = {
            statistic.extent for statistics in self.rounds(context, parameters) for statistic in statistics
        }
        if Extent.MODEL in extents:
            return Extent.MODEL
        if extents:
            return Extent.TENSOR
        return Extent.ROW if self.sees(context, parameters) == Extent.ROW else Extent.ELEMENT


def _follow(
    generator: Generator[Any, Any, Any], answers: Sequence[Sequence[Any]]
) -> Rule | list[Statistic[Any]]:
    try:
        wanted = next(generator)
        for known in answers:
            wanted = generator.send(list(known))
    except StopIteration as stop:
        return stop.value
    generator.close()
    return wanted


_METHODS: dict[str, Method] = {}
DISTRIBUTIONS: dict[str, str] = {}
"""Of packages that bring methods: what identifies what is installed, by the name of the package."""


def method(
    name: str,
    *,
    access: Extent | str = Extent.ELEMENT,
    base: Base | Literal["donor"] = "optional",
    models: tuple[int, int | None] = (1, None),
    bounds: Mapping[str, tuple[float, float]] | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    drop: DropNames = GENERAL,
    fisher: bool = False,
    gram: bool = False,
    workspace: Workspace = 0,
    ignored: Mapping[str, str] | None = None,
    paper: str = "",
    text: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a merge method under `name` and return the function unchanged.

    Parameters
    ----------
    name
        What ``merge_method:`` calls it.
    access
        How its arithmetic may be cut: ``elementwise``, ``row``, ``tensor`` or ``model``.
    base
        Whether ``base_model`` is required, optional, one more model (`member`), only the template of the output's
        files (`template`), or refused (`none`).
    models
        Least and most number of models beside the base (None: no limit).
    bounds
        Inclusive range of a numeric parameter, by name.
    presets
        Defaults that ``preset: NAME`` switches to.
    drop
        The names under which it takes a random drop before it; the method itself does not see them.
    fisher
        Whether each model needs a Fisher diagonal beside it.
    gram
        Whether each model needs Gram matrices beside it.
    workspace
        Bytes that a formula holds at once beyond 8 (2 n + 12) for each element of a piece, n the number of inputs:
        bytes per element, or a function of the `TensorContext` that returns bytes. The planner counts them.
    ignored
        mergekit's parameters without numeric effect here, each with the reason.
    paper
        Where it was published.
    text
        What it does, where that is not the function's docstring.

    Examples
    --------
    >>> import streammerge
    >>> @streammerge.method("midpoint_docs", base="required", models=(1, 1))
    ... def midpoint(models, base, *, t: float = 0.5):
    ...     return base + t * (models[0] - base)
    """

    role = _current(base)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        origin = "built in" if function.__module__.startswith("streammerge.") else function.__module__
        known = _METHODS.get(name)
        if known is not None and known.origin == "built in" and origin != "built in":
            raise InputError(
                f"method {printable(name)!r} of {origin}: the name is taken by a built-in method; choose a different one"
            )
        extent = _extent(name, access)
        _check_signature(name, function, extent)
        parameters = declared(function, bounds or {})
        for parameter in drop_parameters(drop):
            if parameter.name in parameters:
                raise InputError(
                    f"method {printable(name)!r}: {parameter.name!r} is reserved: every method already has it"
                )
            parameters[parameter.name] = parameter
        _METHODS[name] = Method(
            name,
            function,
            extent,
            role,
            models,
            parameters,
            presets or {},
            drop,
            fisher,
            gram,
            workspace,
            ignored or {},
            paper,
            origin,
            inspect.cleandoc(text) if text is not None else inspect.getdoc(function) or "",
        )
        return function

    return register


def _current(base: Base | Literal["donor"]) -> Base:
    """Return the role of the base in today's words."""
    if base != "donor":
        return base
    warnings.warn('base="donor" is now called base="template"', DeprecationWarning, stacklevel=3)
    return "template"


def _extent(name: str, access: Extent | str) -> Extent:
    allowed = [extent for extent in Extent if extent is not Extent.COLUMN]
    if access not in allowed:
        raise InputError(
            f"method {printable(name)!r}: unknown access {printable(access)!r}: give one of {', '.join(allowed)}"
        )
    return Extent(access)


def _check_signature(name: str, function: Callable[..., Any], access: Extent) -> None:
    """Refuse what could never be called, or never be set."""
    what, arguments = f"method {printable(name)!r}", inspect.signature(function).parameters.values()
    positional = [a for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)]
    is_formula = any(argument.name == "models" for argument in arguments)
    takes = ("models", "base") if is_formula else ("context",)
    if len(positional) < len(takes):
        raise InputError(f"{what}: takes {', '.join(takes)} and parameters: def f({', '.join(takes)}, *, …)")
    for argument in positional[len(takes) :]:
        raise InputError(
            f"{what}: no config could set its parameter {argument.name!r}; put a * before it: "
            f"def f({', '.join(takes)}, *, {argument.name}=…)"
        )
    for argument in arguments:
        if argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD):
            raise InputError(f"{what}: no config could set {argument}; name each parameter, with its default")
    if is_formula and access is Extent.MODEL:
        raise InputError(
            f'{what}: access="model" is for methods that ask for statistics, and a formula sees one tensor at a time: use '
            'access="tensor", or write a generator (see docs/build/extending.md)'
        )


def all_methods() -> Mapping[str, Method]:
    """Return every registered method by name, in alphabetical order."""
    return dict(sorted(_METHODS.items()))


def get_method(name: str, where: str = "merge_method") -> Method:
    """Return a method by name.

    Raises
    ------
    ConfigError
        If there is none, naming the closest.
    """
    if name not in _METHODS:
        raise ConfigError(f"{where}: unknown method {printable(name)!r} ({method_meant(name, _METHODS)})")
    return _METHODS[name]
