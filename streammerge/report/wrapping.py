"""How wide text may be."""

from __future__ import annotations

import shutil
import sys

UNWRAPPED = 1 << 20
"""Columns of what is no terminal: a file or a pipe keeps its lines."""


def terminal_width() -> int:
    """Return the columns of the terminal that stdout is; endless where it is none."""
    if not sys.stdout.isatty():
        return UNWRAPPED
    return max(40, shutil.get_terminal_size((100, 24)).columns)
