"""Pages: every text is escaped, charts are well-formed and refer to nothing outside, what is missing is told before any work."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from streammerge.errors import InputError
from streammerge.methods.comparison import TensorDifference
from streammerge.report.comparison import ComparedTensor, Comparison
from streammerge.report.pages.charts import Axis, bars, distinct, lines, square, whole_numbers
from streammerge.report.pages.comparison import comparison_page
from streammerge.report.pages.needed import check_page
from streammerge.report.pages.page import Section, Table, page_html
from streammerge.report.pages.sweep import best_of, number_of, sweep_page
from streammerge.statistics.kinds import SignCounts

pytest.importorskip("vl_convert", reason="the extra `pages` is not installed")

HOSTILE = [
    "</script><script>alert(1)</script>",
    "</title></svg><img src=https://example.org/x onerror=alert(1)>",
    '" onload="alert(1)',
    "' &lt;b&gt; \\",
    "right\u202eto left\u2066\x1b[31m\x00\ud800",
    "${alert(1)} {{x}} datum.value",
]


class Elements(HTMLParser):
    """Collects the names of elements, the names of attributes, and the texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: dict[str, set[str]] = {}
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value or "")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def rows(names: list[str]) -> list[dict[str, str]]:
    return [
        {"lambda": value, HOSTILE[1]: name, "score": f"{i / 7 + j / 9:.4f}", "seconds": "1.5", "reason": name}
        for i, value in enumerate(("0.3", "0.5", HOSTILE[0]))
        for j, name in enumerate(names)
    ]


@pytest.fixture(scope="module")
def page() -> str:
    return sweep_page(rows(HOSTILE), ["lambda", HOSTILE[1]], name=HOSTILE[2], method=HOSTILE[3])


def test_hostile_texts_add_no_element_attribute_or_address(page: str) -> None:
    plain = Elements(sweep_page(rows(["a", "b", "c"]), ["lambda", "density"]))
    found = Elements(page)
    assert found.tags == plain.tags
    assert found.tags.isdisjoint({"script", "img", "iframe", "object", "embed", "form", "base", "b"})
    assert found.attributes.keys() == plain.attributes.keys()
    assert not any(name.startswith("on") for name in found.attributes)
    addresses = found.attributes["href"] | found.attributes.get("src", set())
    assert all(address.startswith(("#", "data:,")) for address in addresses)
    assert not {c for c in page if not c.isprintable()} - {"\n"}


def test_hostile_texts_are_shown_as_they_are(page: str) -> None:
    texts = Elements(page).texts
    assert HOSTILE[0] in texts
    assert r"right\u202eto left\u2066\x1b[31m\x00\ud800" in texts


def test_the_policy_of_a_page_allows_nothing_but_its_own_style(page: str) -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src &#x27;none&#x27;; style-src &#x27;sha256-")
    assert "unsafe" not in policy
    assert "style=" not in page  # the policy would drop it


def test_charts_are_well_formed_and_their_marks_have_titles(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    trees = [ElementTree.fromstring(drawing) for drawing in drawings]
    assert len(trees) == 3  # a curve for each key, and the grid
    titles = [title.text for tree in trees for title in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert any(title and title.startswith("lambda 0.5, ") for title in titles)
    identifiers = [node.attrib["id"] for tree in trees for node in tree.iter() if "id" in node.attrib]
    assert len(identifiers) == len(set(identifiers))


def test_a_page_is_a_function_of_its_content() -> None:
    assert sweep_page(rows(["a", "b"]), ["lambda"]) == sweep_page(rows(["a", "b"]), ["lambda"])


def test_the_best_point_is_the_first_highest_finite_score() -> None:
    scores = [number_of(text) for text in ("", "nan", "0.5", "inf", "0.75", "7.5e-1", "garbage")]
    assert scores == [None, None, 0.5, None, 0.75, 0.75, None]
    assert best_of(scores) == 4
    assert best_of([None]) is None


def test_a_sweep_without_scores_has_a_table_only() -> None:
    page = sweep_page([{"lambda": "1", "score": "", "seconds": "2", "reason": "exit code 1"}], ["lambda"])
    assert "<svg" not in page
    assert "exit code 1" in page
    assert "reason" not in sweep_page(
        [{"lambda": "1", "score": "2", "seconds": "2", "reason": ""}], ["lambda"]
    )


def test_many_series_and_one_point_are_drawn() -> None:
    names = distinct([f"a very long name of a model, number {i}" for i in range(20)])
    assert len(set(names)) == 20
    points = [{"series": name, "x": 0, "y": 1e-9, "tip": name} for name in names]
    axes = whole_numbers("layer", [0]), Axis("norm")
    for drawing in (
        lines(points, *axes, names),
        bars(points, *axes, names),
        square(names, [[None] * 20] * 20),
    ):
        assert "var(--" in drawing
        ElementTree.fromstring(drawing)


def test_an_empty_section_is_left_out_and_a_folded_table_opens() -> None:
    table = Table(["tensor"], [["a"]], "1 identical tensor", folded=True)
    page = page_html("title", [], [Section("nothing"), Section("tensors", tables=[table])])
    assert "nothing" not in page
    assert "<details><summary>1 identical tensor</summary>" in page


def test_what_a_page_lacks_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_page("--html", tmp_path / "page.HTML")
    (tmp_path / "folder.html").mkdir()
    for path, told in {
        tmp_path / "model.safetensors": "is not the name of a page: choose one that ends in .html",
        tmp_path / "folder.html": "is a directory: name a file in it",
        tmp_path / "nowhere" / "page.html": "there is no directory",
    }.items():
        with pytest.raises(InputError, match=re.escape(told)):
            check_page("--html", path)
    with pytest.raises(InputError, match="lies in OUT"):
        check_page("--report", tmp_path / "folder.html" / "x.html", tmp_path)
    monkeypatch.setattr("streammerge.report.pages.needed.find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"--html: pages are drawn by vl-convert.*: install it with `pip install"
    ):
        check_page("--html", tmp_path / "page.html")


def test_of_many_models_the_figures_show_some_and_the_tables_all() -> None:
    n = 30
    counts = np.zeros((n, 256), np.int64)
    counts[:, 120] = 64
    found = TensorDifference(64, 4.0, np.eye(n), np.ones((n, 3)), SignCounts(5, 3), SignCounts(2, 1), counts)
    tensor = ComparedTensor("layers.0.mlp.weight", "mlp", ("layers", 0), ("BF16",) * (n + 1), found)
    page = comparison_page(Comparison("base", tuple(f"model-{i}" for i in range(n)), (tensor,)))
    assert "The figures show 24 of 30 models" in page
    tips = re.findall(r"<title>(model-\d+), layer 0: 1</title>", page)
    assert tips == [*(f"model-{i}" for i in range(23)), "model-29"]
    assert "<td>model-25</td>" in page
