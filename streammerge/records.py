"""Dataclasses that cost nothing until they are used.

The standard library compiles six functions for each frozen dataclass while its module is imported, a third of the time in which
a command starts. Here a class gets its fields, comparison, hash and text by functions of all classes, and `__init__` is
compiled when the first instance is made. `dataclasses.fields`, `replace` and `asdict` work as with their own classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:

    def dataclass(cls: type | None = None, /, **options: bool) -> Any:
        """Do what `dataclasses.dataclass` does with ``frozen``, ``eq``, ``repr``, ``kw_only`` and ``slots``."""
        return _finish(cls, **options) if cls is not None else lambda given: _finish(given, **options)


_FACTORY = object()
"""Stands for the default of a field with a factory, in signatures."""


def _finish(
    given: type,
    *,
    frozen: bool = False,
    eq: bool = True,
    repr: bool = True,
    kw_only: bool = False,
    slots: bool = False,
) -> type:
    own = {name: value for name, value in vars(given).items() if name in _GIVEN}
    described = given.__doc__
    given.__doc__ = described or given.__name__  # else the library looks for a signature, which takes a while
    cls = _with_fields(given, kw_only, slots)
    cls.__doc__ = described
    methods: dict[str, Any] = {"__init__": _starting(cls, frozen)}
    if repr:
        methods["__repr__"] = _text
    if eq:
        methods |= _comparing(cls)
        if not frozen:
            methods["__hash__"] = None
    if frozen:
        methods |= _freezing(cls, slots)
    if own.get("__hash__", _FACTORY) is None and "__eq__" in own:
        del own["__hash__"]  # Python's own, since the class compares by a function of its own
    for name, method in methods.items():
        if name not in own:
            setattr(cls, name, method)
    return cls


def _with_fields(given: type, kw_only: bool, slots: bool) -> type:
    """Return the library's dataclass without methods.

    The library searches each annotation that is text three times for what is not a field; meanwhile one that has none of
    these words is a type.
    """
    annotations: dict[str, Any] = vars(given).get("__annotations__", {})
    plain = {
        name: text
        for name, text in annotations.items()
        if isinstance(text, str) and not any(word in text for word in _NO_FIELDS)
    }
    annotations.update(dict.fromkeys(plain, object))
    make: Callable[[type], type] = dataclasses.dataclass(
        init=False, repr=False, eq=False, kw_only=kw_only, slots=slots
    )
    try:
        cls = make(given)
    finally:
        annotations.update(plain)
    for field in dataclasses.fields(cls):
        if field.name in plain:
            field.type = plain[field.name]
    return cls


_NO_FIELDS = ("ClassVar", "InitVar", "KW_ONLY")
_GIVEN = {
    "__init__",
    "__repr__",
    "__eq__",
    "__hash__",
    "__setattr__",
    "__delattr__",
    "__getstate__",
    "__setstate__",
}
"""Methods that a class may define itself, and then keeps."""


# --- __init__


def _starting(cls: type, frozen: bool) -> Callable[..., None]:
    """Return an `__init__` that puts the true one in its place when it is called first."""

    def __init__(self: Any, *values: Any, **named: Any) -> None:  # noqa: N807
        true = _compiled(cls, frozen)
        if vars(cls).get("__init__") is __init__:
            cls.__init__ = true  # type: ignore[misc]
        true(self, *values, **named)

    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    return __init__


def _compiled(cls: type, frozen: bool) -> Callable[..., None]:
    """Compile the `__init__` of a class: positional fields, then those that are given by name."""
    names: dict[str, Any] = {"_FACTORY": _FACTORY, "_set": object.__setattr__}
    positional, by_name, lines = ["self"], list[str](), list[str]()
    for field in dataclasses.fields(cls):
        name, value = field.name, field.name
        parameter = name
        if field.default_factory is not dataclasses.MISSING:
            names[f"_make_{name}"] = field.default_factory
            parameter = f"{name}=_FACTORY"
            value = f"_make_{name}() if {name} is _FACTORY else {name}" if field.init else f"_make_{name}()"
        elif field.default is not dataclasses.MISSING:
            names[f"_default_{name}"] = field.default
            parameter = f"{name}=_default_{name}"
        if field.init:
            (by_name if field.kw_only else positional).append(parameter)
        if field.init or field.default_factory is not dataclasses.MISSING:
            lines.append(f"_set(self, {name!r}, {value})" if frozen else f"self.{name} = {value}")
    if hasattr(cls, "__post_init__"):
        lines.append("self.__post_init__()")
    parameters = [*positional, *(["*", *by_name] if by_name else [])]
    exec(f"def __init__({', '.join(parameters)}):\n " + "\n ".join(lines or ["pass"]), names)
    true: Callable[..., None] = names["__init__"]
    true.__qualname__, true.__module__ = f"{cls.__qualname__}.__init__", cls.__module__
    return true


# --- comparison, hash and text


def _values(
    cls: type, wanted: Callable[[dataclasses.Field[Any]], object]
) -> Callable[[Any], tuple[Any, ...]]:
    """Return a function of an instance: the tuple of its fields that are wanted."""
    names = [field.name for field in dataclasses.fields(cls) if wanted(field)]
    if len(names) > 1:
        return attrgetter(*names)
    return lambda self: tuple(getattr(self, name) for name in names)


def _comparing(cls: type) -> dict[str, Any]:
    compared = _values(cls, lambda field: field.compare)
    hashed = _values(cls, lambda field: field.compare if field.hash is None else field.hash)

    def __eq__(self: Any, other: object) -> Any:  # noqa: N807
        return compared(self) == compared(other) if other.__class__ is self.__class__ else NotImplemented

    def __hash__(self: Any) -> int:  # noqa: N807
        return hash(hashed(self))

    return {"__eq__": __eq__, "__hash__": __hash__}


@recursive_repr()
def _text(self: Any) -> str:
    shown = (
        f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self) if field.repr
    )
    return f"{type(self).__qualname__}({', '.join(shown)})"


# --- frozen classes


def _freezing(cls: Any, slots: bool) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}

    def __setattr__(self: Any, name: str, value: Any) -> None:  # noqa: N807
        if type(self) is cls or name in names:
            raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
        super(cls, self).__setattr__(name, value)

    def __delattr__(self: Any, name: str) -> None:  # noqa: N807
        if type(self) is cls or name in names:
            raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
        super(cls, self).__delattr__(name)

    both = {"__setattr__": __setattr__, "__delattr__": __delattr__}
    return both | {"__getstate__": _state, "__setstate__": _restore} if slots else both


def _state(self: Any) -> list[Any]:
    return [getattr(self, field.name) for field in dataclasses.fields(self)]


def _restore(self: Any, state: list[Any]) -> None:
    for field, value in zip(dataclasses.fields(self), state, strict=True):
        object.__setattr__(self, field.name, value)
