"""A plan in a few lines, for a prompt or a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_SHOWN = 4
"""The most models and warnings that are listed; the rest are counted."""


def as_text(lines: dict[str, str]) -> str:
    """Return the named lines as text."""
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


def as_html(lines: dict[str, str]) -> str:
    """Return the named lines as an HTML table."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(text)}</td></tr>"
        for name, text in lines.items()
    )
    return f"<table>{rows}</table>"


def first_few(parts: Sequence[str], separator: str = ", ") -> str:
    """Return the first few texts, and the number of the others."""
    more = f"{separator}and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return separator.join(parts[:_SHOWN]) + more
