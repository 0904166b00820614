"""The register of merge methods: what each declares, and how users add their own.

Three kinds of function may be registered, told apart by their signature:

* ``f(models, base, *, parameters...) -> Tensor``: a plain torch formula of the pieces;
* ``f(scope, *, parameters...) -> Recipe``: chooses a recipe, needs no statistics;
* a generator of the second kind that yields lists of requests and is sent the answers.
"""

from __future__ import annotations

import hashlib
import inspect
import typing
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Any, Generic, Literal, TypeVar

from streammerge.errors import ConfigError, InputError, printable
from streammerge.methods.recipes import Formula, Recipe, TaskVectorMerge
from streammerge.methods.requests import Answer, Request

T = TypeVar("T")
Base = Literal["required", "optional", "none"]


class PerModel(tuple[T, ...], Generic[T]):
    """Annotation of a parameter that has one value per model, in configured order."""


class Access(StrEnum):
    """How a method's arithmetic may be cut into pieces."""

    ELEMENTWISE = "elementwise"
    """Anywhere."""
    ROW = "row"
    """Between rows (the last axis stays whole)."""
    TENSOR = "tensor"
    """Needs statistics of the whole tensor (a plain formula: the whole tensor itself)."""
    MODEL = "model"
    """Needs statistics of the whole model."""


@dataclass(frozen=True)
class Parameter:
    """One parameter as a method declares it."""

    name: str
    """As written in YAML: a trailing underscore of the Python name is dropped."""
    kind: tuple[type, ...]
    per_model: bool
    default: Any
    choices: tuple[str, ...] = ()
    bounds: tuple[float, float] | None = None

    @property
    def python_name(self) -> str:
        """The keyword of the Python function."""
        return self.name + "_" if self.name == "lambda" else self.name


@dataclass(frozen=True)
class Scope:
    """What a method may know of the merge when it chooses its recipe."""

    n_models: int
    ordinal: int = 0
    """Number of this tensor in the order of the merge."""


@dataclass(frozen=True)
class Method:
    """A registered method: its function and everything the planner must know about it."""

    name: str
    function: Callable[..., Any]
    access: Access
    """The most the method may need; `passes` tells what a given choice of parameters does need."""
    base: Base
    n_models: tuple[int, int | None]
    parameters: Mapping[str, Parameter]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    """mergekit's parameters without numeric effect here, each with the reason."""
    paper: str = ""
    origin: str = "built in"

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @property
    def fingerprint(self) -> str:
        """The name of a built-in method; with a digest of the source for a user's."""
        if self.origin == "built in":
            return self.name
        source = inspect.getsourcefile(self.function)
        content = Path(source).read_bytes() if source else b""
        return f"{self.name} {hashlib.blake2b(content, digest_size=16).hexdigest()}"

    @property
    def is_formula(self) -> bool:
        """Whether the function is a plain formula of tensors."""
        return "models" in inspect.signature(self.function).parameters

    def start(self, scope: Scope, parameters: Mapping[str, Any], answers: Sequence[Sequence[Answer]]
              ) -> Recipe | list[Request]:  # fmt: skip
        """Follow the method through the `answers` known so far; return what it wants next, or its recipe."""
        keywords = {self.parameters[name].python_name: value for name, value in parameters.items()}
        if self.is_formula:
            return Formula(self.function, keywords)
        result: Any = self.function(scope, **keywords)
        return _follow(result, answers) if inspect.isgenerator(result) else result

    def draws(self, scope: Scope, parameters: Mapping[str, Any]) -> bool:
        """Return whether these parameters make the method draw random words."""
        answers = [[request.placeholder() for request in one] for one in self.rounds(scope, parameters)]
        recipe = self.start(scope, parameters, answers)
        return isinstance(recipe, TaskVectorMerge) and any(vector.is_random for vector in recipe.vectors)

    def rounds(self, scope: Scope, parameters: Mapping[str, Any]) -> list[list[Request]]:
        """Return the requests of each round, following the method with placeholder answers."""
        answers: list[list[Answer]] = []
        rounds: list[list[Request]] = []
        while isinstance(wanted := self.start(scope, parameters, answers), list):
            rounds.append(wanted)
            answers.append([request.placeholder() for request in wanted])
        return rounds

    def access_with(self, scope: Scope, parameters: Mapping[str, Any]) -> Access:
        """Return the access these parameters need, never more than declared."""
        if self.is_formula:
            return self.access
        scopes = {request.scope for requests in self.rounds(scope, parameters) for request in requests}
        if "model" in scopes:
            return Access.MODEL
        return Access.TENSOR if scopes else Access.ELEMENTWISE


def _follow(
    generator: Generator[Any, Any, Any], answers: Sequence[Sequence[Answer]]
) -> Recipe | list[Request]:
    try:
        wanted = next(generator)
        for known in answers:
            wanted = generator.send(list(known))
    except StopIteration as stop:
        return stop.value
    generator.close()
    return wanted


_METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    access: Access | str = Access.ELEMENTWISE,
    base: Base = "optional",
    models: tuple[int, int | None] = (1, None),
    bounds: Mapping[str, tuple[float, float]] | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    ignored: Mapping[str, str] | None = None,
    paper: str = "",
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a merge method under `name` and return the function unchanged.

    Parameters
    ----------
    name
        What ``merge_method:`` calls it.
    access
        How its arithmetic may be cut: ``elementwise``, ``row``, ``tensor`` or ``model``.
    base
        Whether ``base_model`` is required, optional or refused.
    models
        Least and most number of models beside the base (None: no limit).
    bounds
        Inclusive range of a numeric parameter, by name.
    presets
        Defaults that ``preset: NAME`` switches to.

    Examples
    --------
    >>> import streammerge
    >>> @streammerge.method("midpoint_docs", base="required", models=(1, 1))
    ... def midpoint(models, base, *, t: float = 0.5):
    ...     return base + t * (models[0] - base)
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        origin = "built in" if function.__module__.startswith("streammerge.") else function.__module__
        known = _METHODS.get(name)
        if known is not None and known.origin == "built in" and origin != "built in":
            raise InputError(
                f"method {printable(name)!r} from {origin}: the name is taken by a built-in method"
            )
        _METHODS[name] = Method(
            name, function, Access(access), base, models,
            _declared(function, bounds or {}), presets or {}, ignored or {}, paper, origin,
        )  # fmt: skip
        return function

    return register


def _declared(
    function: Callable[..., Any], bounds: Mapping[str, tuple[float, float]]
) -> dict[str, Parameter]:
    hints = typing.get_type_hints(function)
    declared = {}
    for name, argument in inspect.signature(function).parameters.items():
        if argument.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        hint = hints.get(name, float)
        per_model = typing.get_origin(hint) is PerModel
        if per_model:
            (hint,) = typing.get_args(hint)
        kinds, choices = _kinds(hint)
        yaml_name = name.rstrip("_")
        declared[yaml_name] = Parameter(
            yaml_name, kinds, per_model, argument.default, choices, bounds.get(yaml_name)
        )
    return declared


def _kinds(hint: Any) -> tuple[tuple[type, ...], tuple[str, ...]]:
    if typing.get_origin(hint) is Literal:
        return (str,), typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, UnionType):
        parts = [_kinds(part) for part in typing.get_args(hint) if part is not type(None)]
        return sum((kinds for kinds, _ in parts), ()), sum((names for _, names in parts), ())
    return (hint,), ()


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
        close = get_close_matches(name, _METHODS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "see `streammerge methods`"
        raise ConfigError(f"{where}: unknown method {printable(name)!r} ({hint})")
    return _METHODS[name]
