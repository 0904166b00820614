"""Wrap text to the width of the terminal."""

from __future__ import annotations

import shutil
import sys
import textwrap

UNWRAPPED = 1 << 20
"""Width for files and pipes, whose lines are not wrapped."""


def terminal_width() -> int:
    """Return the width of the terminal at stdout; without a terminal a very large number."""
    if not sys.stdout.isatty():
        return UNWRAPPED
    return max(40, shutil.get_terminal_size((100, 24)).columns)


def wrapped(text: str, indent: int | None = None) -> str:
    """Return text wrapped between words if stdout is a terminal; long words stay whole.

    Parameters
    ----------
    indent
        Indentation of continuation lines; default: that of the line.
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
    """Return text with each paragraph on one line if stdout is a terminal, so that `wrapped` can break it."""
    if terminal_width() == UNWRAPPED:
        return text
    paragraphs = text.split("\n\n")
    return "\n\n".join(p if "\n " in p or "\n-" in p else p.replace("\n", " ") for p in paragraphs)
