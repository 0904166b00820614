"""The parameters of a method: its keyword-only arguments, which a config may set."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from types import SimpleNamespace, UnionType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from streammerge.methods.drop import DropNames
from streammerge.records import dataclass

T = TypeVar("T")
CONTEXT = "context"
"""The argument through which a formula receives its `TensorContext`; not a parameter of the config."""


class Missing(Enum):
    """The type of `REQUIRED`, a singleton also after pickling."""

    REQUIRED = "required"


REQUIRED = Missing.REQUIRED
"""The default of a parameter without a default: the config must give its value."""


if TYPE_CHECKING:
    PerModel = tuple[T, ...]
else:

    class PerModel(tuple[T, ...], Generic[T]):
        """Annotation of a parameter that has one value per model, in the config's order."""


def per_model(default: T) -> PerModel[T]:
    """Return the default of a parameter with one value per model: `default` for every model.

    Parameters
    ----------
    default
        The value for each model whose value the config does not give.

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
    """The name in YAML: the Python name without a trailing underscore."""
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
    # Only these are resolved: annotations of the tensors may name a torch that only type checkers import.
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
