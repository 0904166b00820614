"""A plan in a few lines, for a prompt or a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_SHOWN = 4
"""Models and warnings that are spelled out; more are counted."""


def as_text(lines: dict[str, str]) -> str:
    """Return the lines, one below the other, each after its name."""
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


def as_html(lines: dict[str, str]) -> str:
    """Return the lines as a table."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(text)}</td></tr>"
        for name, text in lines.items()
    )
    return f"<table>{rows}</table>"


def first_few(parts: Sequence[str], separator: str = ", ") -> str:
    """Return the first of some texts, and how many more there are."""
    more = f"{separator}and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return separator.join(parts[:_SHOWN]) + more
