"""Our errors are of Python's kinds too, and no handler of those swallows ours on its way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import streammerge
from streammerge import errors

PACKAGE = Path(streammerge.__file__).parent
OURS = {
    name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)
}
DEFINED = {
    node.name
    for path in PACKAGE.rglob("*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef | ast.ClassDef)
}
HARMLESS = {
    *("_apply", "_restored", "_Builder", "Refused", "crc32", "decode", "matches"),
    *(
        "decoded",
        "known_files",
        "load_code",
        "receipt_of",
        "texts_of",
        "Found",
        "Progress",
        "ShardDone",
        "Sign",
        "Tally",
        "Written",
        "cpus_of",
    ),
}
"""Functions of ours that are called where a ValueError is caught, and raise none of ours."""


def swallowing(source: str) -> Iterator[str]:
    """Yield where a ValueError is caught that may be one of ours: what is called there."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Try):
            caught: set[str] = set()
            for handler in node.handlers:
                caught |= names_in(handler.type)
                if "ValueError" in names_in(handler.type) and not caught & OURS:
                    yield from calls_in(node.body)
        if isinstance(node, ast.With) and any(
            "suppress" in ast.unparse(item.context_expr) and "ValueError" in ast.unparse(item.context_expr)
            for item in node.items
        ):
            yield from calls_in(node.body)


def names_in(node: ast.AST | None) -> set[str]:
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)} if node else set()


def calls_in(body: list[ast.stmt]) -> Iterator[str]:
    for call in (node for part in body for node in ast.walk(part) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
        of_the_system = ast.unparse(call.func).startswith("os.")
        if name in DEFINED and name not in HARMLESS and not of_the_system:
            yield f"line {call.lineno}: {name}"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_who_catches_a_value_error_lets_ours_pass(path: Path) -> None:
    assert list(swallowing(path.read_text())) == []


def test_the_check_finds_what_it_looks_for() -> None:
    bad = "try:\n    open_model(x)\nexcept (OSError, ValueError):\n    pass\n"
    assert list(swallowing(bad)) == ["line 2: open_model"]
    assert list(swallowing("with suppress(ValueError):\n    plan(x)")) == ["line 2: plan"]
    assert list(swallowing(bad.replace("except (", "except InputError:\n    raise\nexcept ("))) == []


def test_what_the_user_gave_wrongly_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="merge_method"):
        streammerge.plan({"models": ["a"]})
    with pytest.raises(ValueError, match="no such"):
        streammerge.inspect_model("/nonexistent/model.safetensors")
    assert not issubclass(errors.Stopped, KeyboardInterrupt)
    assert not issubclass(errors.WorldError, ValueError)
