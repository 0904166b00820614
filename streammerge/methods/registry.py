"""The registry of merge methods: what a method declares, and the decorator that registers one.

Three kinds of function can be registered. Their signature tells them apart:

* ``f(models, base, *, parameters...) -> Tensor``: a plain torch formula of blocks of the tensors; a keyword-only argument
  `context` receives the `TensorContext`;
* ``f(context, *, parameters...) -> Rule``: chooses a rule and needs no statistics;
* a generator with the second signature that yields lists of statistics, is sent their values, and returns a rule.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

from streammerge.algebra.extent import Extent
from streammerge.errors import ConfigError, InputError, printable
from streammerge.methods.declaration import Base, Method, Workspace
from streammerge.methods.drop import GENERAL, DropNames
from streammerge.methods.other_names import method_meant
from streammerge.methods.parameters import REQUIRED, Parameter, PerModel, declared, drop_parameters, per_model

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

_METHODS: dict[str, Method] = {}
_PAPERS = "streammerge.methods.papers"


def _load_paper(name: str) -> None:
    """Import the paper that is called like a method or like its first word, if there is one, which registers its methods."""
    for file in dict.fromkeys((name, name.partition("_")[0])):
        if file.isidentifier() and find_spec(f"{_PAPERS}.{file}") is not None:
            importlib.import_module(f"{_PAPERS}.{file}")


@cache
def _load_papers() -> None:
    """Import all papers: all built-in methods are registered afterwards."""
    for found in sorted(one.name for one in pkgutil.iter_modules(importlib.import_module(_PAPERS).__path__)):
        importlib.import_module(f"{_PAPERS}.{found}")


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
    matrices: bool = False,
    workspace: Workspace = 0,
    ignored: Mapping[str, str] | None = None,
    cost: float | None = None,
    paper: str = "",
    text: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a merge method under `name` and return the function unchanged.

    Parameters
    ----------
    name
        Its name in ``merge_method:``.
    access
        The elements that the arithmetic must see at once: ``elementwise``, ``row``, ``tensor`` or ``model``.
    base
        Whether ``base_model`` is required, optional, one more model (``member``), only the template for the output's
        files (``template``), or refused (``none``).
    models
        Smallest and largest number of models without the base (None: no limit).
    bounds
        Inclusive range of a numeric parameter, by name.
    presets
        Defaults that ``preset: NAME`` switches to.
    drop
        The names of the parameters of the random drop before the method; the method itself does not receive them.
    fisher
        Whether each model needs a Fisher diagonal.
    gram
        Whether each model needs Gram matrices.
    matrices
        Whether it returns a `MatrixMerge` for the tensors that have a `context.matrix`. Its `workspace` is then all that
        such a merge holds in addition to its inputs.
    workspace
        Bytes that a formula holds at once beyond 8 (2 n + 12) per element of a block, n being the number of inputs:
        bytes per element, or a function of the `TensorContext` that returns bytes. The planner reserves them.
    ignored
        Parameters of mergekit that have no numeric effect here, each with the reason.
    cost
        Core seconds per GB of inputs, by which ``--device auto`` weighs CPUs against a GPU; None: unknown.
    paper
        Where it was published.
    text
        A description for users; default: the function's docstring.

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
        if origin != "built in":
            _load_papers()
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
            matrices,
            workspace,
            ignored or {},
            paper,
            origin,
            inspect.cleandoc(text) if text is not None else inspect.getdoc(function) or "",
            cost,
        )
        return function

    return register


def _current(base: Base | Literal["donor"]) -> Base:
    """Return the role of the base; replace its old name."""
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
    """Refuse a function that could not be called, and parameters that no config could set."""
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
    _load_papers()
    return dict(sorted(_METHODS.items()))


def get_method(name: str, where: str = "merge_method") -> Method:
    """Return a method by name.

    Raises
    ------
    ConfigError
        If there is none; the message names the closest.
    """
    if name not in _METHODS:
        _load_paper(name)
    if name not in _METHODS:
        _load_papers()
    if name not in _METHODS:
        raise ConfigError(f"{where}: unknown method {printable(name)!r} ({method_meant(name, _METHODS)})")
    return _METHODS[name]
