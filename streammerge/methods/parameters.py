"""The parameters of a method: its keyword-only arguments, as a config may give them."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from streammerge.methods.drop import DropNames

T = TypeVar("T")
CONTEXT = "context"
"""The argument by which a formula is told which tensor it is given; no parameter."""


class Missing(Enum):
    """What stands where nothing was given; it stays itself when pickled."""

    REQUIRED = "required"


REQUIRED = Missing.REQUIRED
"""The default of a parameter that has none: the config must give it."""


if TYPE_CHECKING:
    PerModel = tuple[T, ...]
else:

    class PerModel(tuple[T, ...], Generic[T]):
        """Annotation of a parameter that has one value per model, in configured order."""


def per_model(default: T) -> PerModel[T]:
    """Return the default of a parameter with one value per model: the same for all of them.

    Parameters
    ----------
    default
        The value of each model that the config gives none.

    Examples
    --------
    >>> import streammerge
    >>> from streammerge import PerModel, per_model
    >>> @streammerge.method("half_docs", base="none")
    ... def half(models, base, *, weight: PerModel[float] = per_model(0.5)):
    ...     return sum(w * theta for w, theta in zip(weight, models))
    """
    return cast("PerModel[T]", default)


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


def declared(function: Callable[..., Any], bounds: Mapping[str, tuple[float, float]]) -> dict[str, Parameter]:
    """Return the parameters of a function, by their names in YAML."""
    found = {}
    keywords = {
        name: argument
        for name, argument in inspect.signature(function).parameters.items()
        if argument.kind is inspect.Parameter.KEYWORD_ONLY and name != CONTEXT
    }
    # Of these alone: the tensors' annotation may name a torch that only type checkers import.
    written = SimpleNamespace(
        __annotations__={n: h for n, h in function.__annotations__.items() if n in keywords}
    )
    hints = typing.get_type_hints(written, getattr(function, "__globals__", {}))
    for name, argument in keywords.items():
        hint = hints.get(name, float)
        per_model = typing.get_origin(hint) is PerModel
        if per_model:
            (hint,) = typing.get_args(hint)
        kinds, choices = _kinds(hint)
        yaml_name = name.rstrip("_")
        default = REQUIRED if argument.default is inspect.Parameter.empty else argument.default
        found[yaml_name] = Parameter(yaml_name, kinds, per_model, default, choices, bounds.get(yaml_name))
    return found


def drop_parameters(names: DropNames) -> list[Parameter]:
    """Return the parameters of the drop before a method."""
    nothing = 1.0 if names.keeps else 0.0
    return [
        Parameter(names.fraction, (float,), True, nothing, (), (0.0, 1.0)),
        Parameter(names.rescale, (str,), False, "paper", ("paper", "l1", "none")),
        Parameter(names.mask, (str,), False, "bernoulli", ("bernoulli", "exact", "magnitude")),
        Parameter(names.shared, (bool,), False, False),
    ]


def _kinds(hint: Any) -> tuple[tuple[type, ...], tuple[str, ...]]:
    if typing.get_origin(hint) is Literal:
        return (str,), typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, UnionType):
        parts = [_kinds(part) for part in typing.get_args(hint) if part is not type(None)]
        return sum((kinds for kinds, _ in parts), ()), sum((names for _, names in parts), ())
    return (hint,), ()
