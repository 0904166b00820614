"""One self-contained HTML page: a title, sections with figures and tables. It has no script and loads nothing.

Every text is untrusted, since checkpoints and configs contain names: `page_html` and the parts escape it. Drawings are the only
markup that is taken as it is; `streammerge.report.pages.charts` makes them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from streammerge.errors import printable
from streammerge.records import dataclass
from streammerge.report.pages.charts import Svg
from streammerge.version import __version__

_MOST_TEXT = 2000
"""The most characters of one text."""
_MOST_NAME = 250
"""The most characters of the name of a row, of which there may be hundreds."""


@dataclass(frozen=True)
class Figure:
    """A drawing with its title and a line that says how to read it."""

    title: str
    drawing: Svg
    note: str = ""

    def html(self) -> str:
        """Return the markup."""
        note = f"<span>{text_html(self.note)}</span>" if self.note else ""
        return f"<figure><figcaption>{text_html(self.title)}{note}</figcaption>{self.drawing}</figure>"


@dataclass(frozen=True)
class Table:
    """A table; its first column names the row."""

    head: Sequence[str]
    """The titles of the columns; without any it is a list of facts, whose long texts are wrapped."""
    rows: Sequence[Sequence[str]]
    caption: str = ""
    folded: bool = False
    """Whether only the caption is shown until the reader opens it."""
    best: int | None = None
    """The row that is marked as the best."""

    def html(self) -> str:
        """Return the markup."""
        head = "".join(f'<th scope="col">{text_html(text)}</th>' for text in self.head)
        body = "".join(self._row(row, i == self.best) for i, row in enumerate(self.rows))
        caption = (
            f'<p class="caption">{text_html(self.caption)}</p>' if self.caption and not self.folded else ""
        )
        opening = "<table>" if self.head else '<table class="facts">'
        titles = f"<thead><tr>{head}</tr></thead>" if self.head else ""
        table = (
            f'{caption}<div class="scroll" tabindex="0">{opening}{titles}<tbody>{body}</tbody></table></div>'
        )
        if not self.folded:
            return table
        return f"<details><summary>{text_html(self.caption)}</summary>{table}</details>"

    @staticmethod
    def _row(cells: Sequence[str], best: bool) -> str:
        opening = '<td class="best">' if best else "<td>"
        first, *others = cells
        shown = [text_html(first, _MOST_NAME), *map(text_html, others)]
        return f"<tr>{''.join(f'{opening}{cell}</td>' for cell in shown)}</tr>"


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, paragraphs, figures in columns, tables below."""

    title: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()

    def html(self) -> str:
        """Return the markup; nothing if the section is empty."""
        if not (self.paragraphs or self.figures or self.tables):
            return ""
        texts = "".join(f"<p>{text_html(text)}</p>" for text in self.paragraphs)
        figures = "".join(figure.html() for figure in self.figures)
        grid = f'<div class="figures">{figures}</div>' if figures else ""
        tables = "".join(table.html() for table in self.tables)
        return f"<section><h2>{text_html(self.title)}</h2>{texts}{grid}{tables}</section>\n"


def page_html(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """Return a page as HTML in UTF-8, whose policy forbids scripts and every request.

    Parameters
    ----------
    lead
        Paragraphs below the title.
    """
    style = (files("streammerge.report.pages") / "page.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )
    paragraphs = "".join(f'<p class="lead">{text_html(text)}</p>' for text in lead)
    body = "".join(section.html() for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">\n'
        f'<link rel="icon" href="data:,"><title>{text_html(title)}</title>\n'
        f"<style>{style}</style></head>\n<body><main><h1>{text_html(title)}</h1>{paragraphs}\n{body}</main>\n"
        f"<footer>streammerge {text_html(__version__)}. This page needs no network.</footer></body></html>\n"
    )


def text_html(text: object, most: int = _MOST_TEXT) -> str:
    """Return a text as HTML that shows it, characters that could change its direction or hide it as escapes.

    >>> text_html('</td><script>"&\\u202e')
    '&lt;/td&gt;&lt;script&gt;&quot;&amp;\\\\u202e'
    """
    return escape(printable(text, most))
