"""Dataclasses whose methods wait for their first use behave as those of the standard library."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import FrozenInstanceError, asdict, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import pytest

from streammerge.records import dataclass as ours


def classes(dataclass: Any) -> dict[str, Any]:
    """Return classes with all that the package asks of dataclasses, made by a decorator."""

    @dataclass(frozen=True)
    class Point:
        """A point."""

        x: int
        y: float = 2.0
        tags: tuple[str, ...] = field(default=(), compare=False)
        marks: list[int] = field(default_factory=list, hash=False, repr=False)
        kind: ClassVar[str] = "point"

        @cached_property
        def double(self) -> int:
            return 2 * self.x

    @dataclass(frozen=True)
    class Deep(Point):
        z: int = 5

        def __repr__(self) -> str:
            return f"<{self.z}>"

    @dataclass(frozen=True, slots=True)
    class Lean:
        x: int
        y: int = 1

    @dataclass(kw_only=True)
    class Named:
        a: int
        b: int = field(default=7, init=False)

        def __post_init__(self) -> None:
            self.b += self.a

    @dataclass(frozen=True, eq=False)
    class Single:
        x: int

    @dataclass
    class Empty:
        pass

    class Plain(Point):
        pass

    return {c.__name__: c for c in (Point, Deep, Lean, Named, Single, Empty, Plain)}


CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("Point", (1,), {}),
    ("Point", (1, 3.0), {"marks": [4]}),
    ("Deep", (1, 2.0, ("a",)), {}),
    ("Lean", (3,), {}),
    ("Named", (), {"a": 2}),
    ("Empty", (), {}),
    ("Plain", (9,), {}),
]
OURS, THEIRS = classes(ours), classes(dataclasses.dataclass)


@pytest.mark.parametrize(("name", "values", "named"), CALLS)
def test_instances_are_as_those_of_the_standard_library(
    name: str, values: tuple[Any, ...], named: dict[str, Any]
) -> None:
    for made in (classes(ours), OURS):  # of a class that has no instances yet, and of one that may have some
        mine, theirs = made[name](*values, **named), THEIRS[name](*values, **named)
        assert repr(mine).rpartition(".")[2] == repr(theirs).rpartition(".")[2]
        assert asdict(mine) == asdict(theirs)
        assert [f.name for f in fields(mine)] == [f.name for f in fields(theirs)]
        assert mine == made[name](*values, **named)
        assert (mine == theirs) is False
        assert copy.copy(mine) == copy.deepcopy(mine) == mine
        assert (type(mine).__hash__ is None) == (type(theirs).__hash__ is None)
        assert type(mine).__match_args__ == type(theirs).__match_args__


def test_equal_instances_hash_alike_and_what_is_not_compared_does_not_count() -> None:
    point = OURS["Point"]
    assert hash(point(1, tags=("a",), marks=[1])) == hash(point(1, tags=("b",), marks=[2]))
    assert point(1, tags=("a",)) == point(1)
    assert point(1) != point(2)
    assert point(1) != OURS["Plain"](1)
    single = OURS["Single"]
    assert single(1) != single(1)
    assert len({single(1), single(1)}) == 2
    assert point(1).marks is not point(1).marks


@pytest.mark.parametrize("name", ["Point", "Deep", "Lean"])
def test_a_frozen_instance_cannot_be_changed_but_replaced(name: str) -> None:
    one = OURS[name](1)
    for change in (lambda: setattr(one, "x", 2), lambda: delattr(one, "x"), lambda: setattr(one, "new", 2)):
        with pytest.raises((FrozenInstanceError, TypeError)):
            change()
    assert (one.x, replace(one, x=4).x) == (1, 4)


def test_a_cached_property_and_a_plain_subclass_work() -> None:
    plain = OURS["Plain"](3)
    plain.note = "may be set, since the class is no dataclass"
    assert (plain.double, plain.note[:3]) == (6, "may")
    with pytest.raises(FrozenInstanceError):
        plain.x = 1


@pytest.mark.parametrize("made", [OURS, THEIRS])
def test_wrong_arguments_are_refused_by_name(made: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"Point\.__init__\(\) missing 1 required positional argument: 'x'"):
        made["Point"]()
    with pytest.raises(TypeError, match="unexpected keyword argument 'w'"):
        made["Point"](1, w=2)
    with pytest.raises(TypeError, match="positional argument"):
        made["Named"](1)


@ours(frozen=True, slots=True)
class Sent:
    """An instance that goes to a different process."""

    x: int
    y: str = "y"


def test_an_instance_that_was_only_unpickled_compares_and_hashes() -> None:
    sent = pickle.dumps(Sent(1))
    assert pickle.loads(sent) == pickle.loads(sent) == Sent(1)
    assert hash(pickle.loads(sent)) == hash(Sent(1))
