"""The pages in a real browser: no request leaves the machine, no complaint, the pictures are there, in dark and on a phone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import streammerge
from streammerge.report.pages.sweep import sweep_page
from tests.conftest import write_models
from tests.report.pages.test_page import HOSTILE, rows

sys.path.insert(0, str(Path(__file__).parents[3] / "tools" / "pages"))

from browser import Browser, Seen, browser, program

pytest.importorskip("vl_convert", reason="the extra `pages` is not installed")
pytestmark = pytest.mark.skipif(program() is None, reason="there is no Chromium: apt-get install chromium")

quiet: dict[str, Any] = {"on_event": lambda event: None}
PICTURES = {"comparison": 6, "report": 11, "sweep": 3}
VISIBLE = """[...document.querySelectorAll('figure svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll('[role=graphics-symbol]')];
  return box.width > 200 && box.height > 80 && box.right <= innerWidth
    && marks.some(mark => mark.getBoundingClientRect().height > 0);
})"""
COLOURS = """[...document.querySelectorAll('body, h1, p, td, figcaption, svg text')].map(
  one => getComputedStyle(one)[one.tagName == 'text' ? 'fill' : 'color'])"""
LABELS = """[...document.querySelectorAll('table.facts td:first-child')].map(cell => {
  const range = document.createRange();
  range.selectNodeContents(cell);
  return range.getClientRects().length;
})"""
"""The lines of each label of a list of facts."""
SECOND_COLUMNS = """[...document.querySelectorAll('section > .scroll td:nth-child(2)')].every(
  cell => cell.getBoundingClientRect().right <= innerWidth)"""
"""Whether a number stands beside each name, and not only the name."""

ON_CELLS = {"rgb(255, 255, 255)", "rgb(28, 33, 40)"}
"""Texts on the cells of a matrix, which have colours of their own in light and dark."""


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    with browser() as one:
        yield one


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of each kind, full of names that would run or load something if they could."""
    folder = tmp_path_factory.mktemp("pages")
    base, *models = write_models(folder, 2)
    named = []
    for path, name in zip(
        models, ("</b><script>window.ran=1<", "'\"><img src=x onerror=ran=1>\u202e"), strict=True
    ):
        named.append(path.rename(folder / name.replace("/", "")))
    streammerge.compare(named, base, html=folder / "comparison.html", **quiet)
    config = {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(path), "parameters": {"density": 0.3, "weight": 1.0}} for path in named],
    }
    streammerge.merge(config, folder / "out", report=folder / "report.html", **quiet)
    (folder / "sweep.html").write_text(sweep_page(rows(HOSTILE), ["lambda", HOSTILE[1]], name=HOSTILE[0]))
    return {name: folder / f"{name}.html" for name in PICTURES}


def brightness(colour: str) -> float:
    red, green, blue = map(float, colour.removeprefix("rgb(").removesuffix(")").split(","))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize(("width", "dark"), [(1000, False), (390, True)], ids=["desk", "phone in the dark"])
def test_a_page_is_whole_and_alone(
    opened: Browser, pages: dict[str, Path], kind: str, width: int, dark: bool
) -> None:
    path = pages[kind]
    assert path.stat().st_size < 1_000_000
    seen = opened.open(path, width=width, dark=dark)
    assert seen == Seen([path.as_uri()], [])
    assert opened.evaluate(VISIBLE) == [True] * PICTURES[kind]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.evaluate("[window.ran, document.scripts.length, document.images.length]") == [None, 0, 0]
    assert set(opened.evaluate(LABELS)) <= {1}
    assert kind == "sweep" or opened.evaluate(SECOND_COLUMNS)
    paper = brightness(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert paper < 40 if dark else paper > 240
    faint = {ink for ink in opened.evaluate(COLOURS) if abs(brightness(ink) - paper) < 90}
    assert faint <= ON_CELLS


def test_the_browser_would_tell(opened: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('no'); nothing()</script>")
    seen = opened.open(page)
    assert "http://127.0.0.1:9/x.png" in seen.requests
    assert {"['no']", "Uncaught"} <= set(seen.complaints)
