"""What the documentation shows works: the YAML parses, the example method runs, every command is described."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from streammerge.config.schema import parse_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (f"{page.name}:{i}", text)
        for page in PAGES
        for i, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL))
    ]


@pytest.mark.parametrize(("place", "text"), blocks("yaml"), ids=lambda value: str(value)[:40])
def test_every_config_in_the_docs_is_accepted(place: str, text: str) -> None:
    assert parse_config(text, place).models


@pytest.mark.parametrize(("place", "text"), blocks("python"), ids=lambda value: str(value)[:40])
def test_every_python_block_in_the_docs_runs(place: str, text: str) -> None:
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_link_between_the_docs_leads_to_a_file() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_names_every_builtin_method() -> None:
    from streammerge.methods.catalog import load_builtin
    from streammerge.methods.registry import all_methods

    load_builtin()
    table = (ROOT / "README.md").read_text()
    pages = (ROOT / "docs" / "methods.md").read_text()
    for name, method in all_methods().items():
        if method.origin == "built in":
            assert f"`{name}`" in table
            assert name in pages
