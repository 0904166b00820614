"""The package is a stack of layers, and the command line starts without the heavy ones."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import streammerge

PACKAGE = Path(streammerge.__file__).parent
LAYERS = [
    "errors units dtypes compiled lazy",
    "index",
    "config",
    "methods",
    "kernels",
    "planning",
    "engine",
    "network",
    "fisher",
    "gram",
    "report",
    "api",
    "demo",
    "cli",
    "__main__",
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def imports_of(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Yield every module of ours that the code imports, inside functions too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child):
            for other in child.orelse:
                yield from imports_of(other, module, is_package)
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            parts = module.split(".")
            above = parts[: len(parts) - child.level + is_package] if child.level else []
            source = ".".join([*above, *([child.module] if child.module else [])])
            yield from (f"{source}.{alias.name}" for alias in child.names)
        yield from imports_of(child, module, is_package)


def layer_of(module: str) -> str | None:
    """Return the layer that a dotted name lies in; None outside of the package, or for its root."""
    parts = module.split(".")
    return parts[1] if parts[0] == "streammerge" and len(parts) > 1 and parts[1] in RANK else None


def upward_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    own = layer_of(module)
    limit = RANK[own] if own else 0
    found = (name for name in imports_of(ast.parse(source), module, is_package) if layer_of(name))
    return [name for name in found if RANK[str(layer_of(name))] > limit]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=[module_name(path) for path in MODULES])
def test_a_module_imports_nothing_from_a_layer_above(path: Path) -> None:
    assert upward_imports(path.read_text(), module_name(path), path.name == "__init__.py") == []


def test_every_part_of_the_package_has_a_layer() -> None:
    parts = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert parts - {"__init__"} == set(RANK)


def test_the_check_finds_what_it_looks_for() -> None:
    bad = "if x:\n    def f():\n        from streammerge.engine import run\n"
    assert upward_imports(bad, "streammerge.planning.plan") == ["streammerge.engine.scheduler"]
    assert upward_imports("from streammerge import api", "streammerge.report.card") == ["streammerge.api"]
    assert upward_imports("from ..engine.run import Runner", "streammerge.planning.plan") == [
        "streammerge.engine.scheduler.Runner"
    ]
    assert upward_imports("from .engine import run", "streammerge", True) == ["streammerge.engine.scheduler"]
    assert upward_imports("import streammerge.cli", "streammerge.api") == ["streammerge.cli"]
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from streammerge.engine import run\n"
    assert upward_imports(guarded, "streammerge.planning.plan") == []
    assert upward_imports("from streammerge.planning import job", "streammerge.planning.plan") == []


def test_no_part_of_the_package_has_a_public_name() -> None:
    """Importing such a part would bind the module over the function of that name."""
    assert {part.stem for part in PACKAGE.iterdir()} & set(streammerge.__all__) == set()


@pytest.mark.parametrize("names", ["merge, plan", "plan, merge", "verify, plan, merge"])
def test_public_names_are_functions_in_whatever_order_they_are_imported(names: str) -> None:
    code = f"from streammerge import {names}\nimport streammerge\nassert all(map(callable, ({names}, streammerge.plan)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


HEAVY = ("torch", "numba", "numpy", "safetensors", "zarr")


@pytest.mark.parametrize(
    "code",
    [
        "import streammerge",
        "import streammerge.cli",
        "import sys\nfrom streammerge.cli import main\nsys.argv = ['streammerge', '--help']\ntry:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code",
    ],
    ids=["import streammerge", "import streammerge.cli", "streammerge --help"],
)
def test_starting_imports_no_array_library(code: str) -> None:
    report = f"\nimport sys, json\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    if "--help" in code:
        assert "Merge neural-network checkpoints" in done.stdout
