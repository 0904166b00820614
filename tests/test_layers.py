"""The law of imports: ranks, two towers apart, no circles, no hidden names; and the command line starts light.

A module is a dotted name, an import an arrow from one module to another. Every rule is a function of the arrows, so that
each can be shown to fail on a small package of its own (the tests at the end of each section).
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import streammerge
from tests.patience import PATIENCE

PACKAGE = Path(streammerge.__file__).parent
RANKS = [
    "errors version lazy records installed",
    "dtypes events timing units",
    "numerics",
    "kernels machine",
    "io",
    "formats",
    "config",
    "checkpoint",
    "algebra",
    "tensors",
    "statistics",
    "methods",
    "backends",
    "planning",
    "estimate",
    "output",
    "engine",
    "report",
    "api testing launch",
    "demo",
    "cli",
    "__main__",
]
"""Rooms from the ground up; a module imports from its own rank and from those before it."""
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms.split()}
BYTES = {"io", "formats", "checkpoint", "tensors"}
MATHEMATICS = {"kernels", "algebra", "statistics", "methods"}
"""Two towers on one ground; they never import each other."""
TOOLS_OF_PAPERS = {
    "streammerge.methods.registry",
    "streammerge.methods.steps",
    "streammerge.methods.drop",
    "streammerge.methods.gram_space",
    "streammerge.methods.tensor_context",
}
ROOMS_OF_PAPERS = {"errors", "records", "dtypes", "units", "numerics", "algebra", "statistics"}

Arrows = Mapping[str, set[str]]
"""The modules of ours that each module imports, inside functions and for type checking too."""


def arrows_of(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Return what each module of a package imports, given the source of each."""
    packages = {name.rpartition(".")[0] for name in sources}
    return {
        module: set(_imports(ast.parse(source), module, module in packages, sources)) - {module}
        for module, source in sources.items()
    }


def _imports(tree: ast.AST, module: str, is_package: bool, known: Mapping[str, str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            above = parts[: len(parts) - node.level + is_package] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                if full in known:
                    yield full
                elif source in known:
                    yield source


def room_of(module: str) -> str:
    """Return the room that a module lies in: the name below the package; empty for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


ARROWS = arrows_of({module_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))})


# --- ranks


def climbs(arrows: Arrows) -> Iterator[str]:
    """Yield imports from a room above."""
    for module, imported in arrows.items():
        if room := room_of(module):  # the package itself hands names on from everywhere
            higher = [name for name in imported if RANK.get(room_of(name), 0) > RANK.get(room, 0)]
            yield from (f"{module} climbs to {name}" for name in higher)


def test_a_module_imports_nothing_from_a_room_above() -> None:
    assert sorted(climbs(ARROWS)) == []


def test_every_room_has_a_rank() -> None:
    rooms = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert rooms - {"__init__"} <= set(RANK)


def test_a_climb_is_found_wherever_the_import_stands() -> None:
    sources = {
        "streammerge.io.files": "def f():\n    if x:\n        from streammerge.engine import merge\n",
        "streammerge.engine": "",
        "streammerge.engine.merge": "from streammerge.io.files import f",
        "streammerge.report.card": "from ..api import deciding",
        "streammerge.api.deciding": "",
    }
    assert sorted(climbs(arrows_of(sources))) == [
        "streammerge.io.files climbs to streammerge.engine.merge",
        "streammerge.report.card climbs to streammerge.api.deciding",
    ]


# --- the two towers


def bridges(arrows: Arrows) -> Iterator[str]:
    """Yield imports between the tower of bytes and that of mathematics."""
    for module, imported in arrows.items():
        for name in imported:
            rooms = {room_of(module), room_of(name)}
            if rooms & BYTES and rooms & MATHEMATICS:
                yield f"{module} crosses to {name}"


def test_the_towers_of_bytes_and_of_mathematics_never_import_each_other() -> None:
    assert sorted(bridges(ARROWS)) == []


def test_a_bridge_is_found_in_both_directions() -> None:
    sources = {
        "streammerge.tensors.read": "from streammerge.kernels import blocks",
        "streammerge.kernels.blocks": "",
        "streammerge.statistics.base": "import streammerge.formats.zarr_store",
        "streammerge.formats.zarr_store": "from streammerge.numerics import casts",
        "streammerge.numerics.casts": "",
    }
    assert sorted(bridges(arrows_of(sources))) == [
        "streammerge.statistics.base crosses to streammerge.formats.zarr_store",
        "streammerge.tensors.read crosses to streammerge.kernels.blocks",
    ]


# --- circles


def circles(arrows: Arrows) -> list[list[str]]:
    """Return the groups of modules that import each other in a loop (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in sorted(arrows.get(module, ())):
            if other not in number:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == number[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in arrows:
        if module not in number:
            visit(module)
    return found


def test_no_module_is_in_a_circle_not_even_for_type_checking() -> None:
    assert [" ~ ".join(group) for group in circles(ARROWS)] == []


def test_a_circle_is_found_through_an_import_for_type_checking() -> None:
    sources = {
        "streammerge.a": "from streammerge import b",
        "streammerge.b": "from streammerge.c import f",
        "streammerge.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from streammerge.a import g\n",
        "streammerge.d": "import streammerge.a",
    }
    assert circles(arrows_of(sources)) == [["streammerge.a", "streammerge.b", "streammerge.c"]]


# --- names


def test_no_part_of_the_package_has_a_public_name() -> None:
    """Importing such a part would bind the module over the function of that name."""
    assert {part.stem for part in PACKAGE.iterdir()} & set(streammerge.__all__) == set()


@pytest.mark.parametrize("names", ["merge, plan", "plan, merge", "verify, plan, merge"])
def test_public_names_are_functions_in_whatever_order_they_are_imported(names: str) -> None:
    code = f"from streammerge import {names}\nimport streammerge\nassert all(map(callable, ({names}, streammerge.plan)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


# --- papers, estimates


def strays(arrows: Arrows) -> Iterator[str]:
    """Yield imports of papers beyond the tools of methods, and of estimates from the engine or the output."""
    for module, imported in arrows.items():
        for name in imported:
            if module.startswith("streammerge.methods.papers."):
                allowed = name in TOOLS_OF_PAPERS or room_of(name) in ROOMS_OF_PAPERS
                if not allowed and name != "streammerge.methods.papers":
                    yield f"{module} strays to {name}"
            elif room_of(module) == "estimate" and room_of(name) in ("engine", "output"):
                yield f"{module} strays to {name}"


def test_papers_see_the_tools_of_methods_only_and_estimates_no_merge() -> None:
    assert sorted(strays(ARROWS)) == []


def test_a_paper_that_looks_elsewhere_is_found() -> None:
    sources = {
        "streammerge.methods.papers.ties": "from streammerge.methods import registry, catalog\nimport streammerge.io.reader",
        "streammerge.methods.registry": "",
        "streammerge.methods.catalog": "",
        "streammerge.io.reader": "",
        "streammerge.estimate.gram.compute": "from streammerge.engine.task import run",
        "streammerge.engine.task": "",
    }
    assert sorted(strays(arrows_of(sources))) == [
        "streammerge.estimate.gram.compute strays to streammerge.engine.task",
        "streammerge.methods.papers.ties strays to streammerge.io.reader",
        "streammerge.methods.papers.ties strays to streammerge.methods.catalog",
    ]


# --- start


def compiled_at_import(sources: Mapping[str, str]) -> list[str]:
    """Return the modules that compile a regular expression while they are imported."""
    return sorted(module for module, source in sources.items() if _compiles(ast.parse(source)))


def _compiles(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return False
    return ast.unparse(node).startswith("re.compile(") or any(map(_compiles, ast.iter_child_nodes(node)))


def test_expressions_are_compiled_when_they_are_used() -> None:
    sources = {str(path): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert compiled_at_import({name: text for name, text in sources.items() if "re.compile(" in text}) == []


def test_an_expression_that_is_compiled_at_import_is_found() -> None:
    sources = {
        "a": "import re\nKEY = (re.compile('x'), 1)",
        "b": "import re\ndef f():\n    return re.compile('x')",
        "c": "import re\nclass C:\n    KEY = re.compile('x')",
    }
    assert compiled_at_import(sources) == ["a", "c"]


HEAVY = ("torch", "numba", "numpy", "safetensors", "zarr")
HELP = """
import sys
from streammerge.cli import main
sys.argv = ['streammerge', '--help']
try:
    main()
except SystemExit as stop:
    assert not stop.code
"""


@pytest.mark.parametrize(
    "code",
    ["import streammerge", "import streammerge.cli", HELP],
    ids=["import streammerge", "import streammerge.cli", "streammerge --help"],
)
def test_starting_imports_no_array_library(code: str) -> None:
    report = f"\nimport sys, json\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    if "--help" in code:
        assert "Merge neural-network checkpoints" in done.stdout
