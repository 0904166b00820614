"""docs/use/messages.md quotes what the program says."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = next((ROOT / "docs").rglob("messages.md")).read_text()
QUOTED = re.findall(r"^\*\*`(.+)`\*\*$", PAGE, re.MULTILINE)
HOLE = "…"


@cache
def texts() -> tuple[str, ...]:
    """Return every text in the package's source, with a hole where a value is put in."""
    found = []
    for path in (ROOT / "streammerge").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(v.value if isinstance(v, ast.Constant) else HOLE for v in node.values)  # type: ignore[misc]
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def pieces(quoted: str) -> list[str]:
    """Return what stands between the holes: three letters at least, for what is less says nothing."""
    return [
        piece for piece in (p.strip(" :;,") for p in quoted.split(HOLE)) if re.search(r"\w{3}|\w \w", piece)
    ]


def test_the_page_quotes_many_messages() -> None:
    assert len(QUOTED) > 50
    assert len(QUOTED) == len(set(QUOTED)) == PAGE.count("\n**`")


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_message_is_one_of_the_program(quoted: str) -> None:
    parts = pieces(quoted)
    assert sum(map(len, parts)) > 15, "too little to be found by"
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    assert any(pattern.search(text) for text in texts()), quoted
