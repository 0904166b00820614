"""Wraps text to the width of the terminal."""

from __future__ import annotations

import shutil
import sys
import textwrap

UNWRAPPED = 1 << 20
"""Columns of what is no terminal: a file or a pipe keeps its lines."""


def terminal_width() -> int:
    """Return the columns of the terminal that stdout is; endless where it is none."""
    if not sys.stdout.isatty():
        return UNWRAPPED
    return max(40, shutil.get_terminal_size((100, 24)).columns)


def wrapped(text: str, indent: int | None = None) -> str:
    """Return text wrapped between words where stdout is a terminal; words that are longer stay whole.

    Parameters
    ----------
    indent
        Of a line's continuation; default: as the line itself begins.
    """
    width = terminal_width()
    return "\n".join(
        textwrap.fill(
            line,
            width,
            subsequent_indent=" " * (len(line) - len(line.lstrip()) if indent is None else indent),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.split("\n")
    )


def reflowed(text: str) -> str:
    """Return text whose paragraphs are a line each where stdout is a terminal, for `wrapped` to break anew."""
    if terminal_width() == UNWRAPPED:
        return text
    paragraphs = text.split("\n\n")
    return "\n\n".join(p if "\n " in p or "\n-" in p else p.replace("\n", " ") for p in paragraphs)
