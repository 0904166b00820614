"""What a page needs: the library that draws, memory for it, and a file to write to. All of it is checked before any work."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from streammerge.errors import BudgetError, InputError, printable
from streammerge.io.durable import write_file
from streammerge.planning.memory.budget import Budget
from streammerge.units import format_at_least, format_size

SUFFIXES = (".html", ".htm")
DRAWING_NBYTES = 96 << 20
"""Resident memory that drawing a page takes. The buffers are free by then."""
POINT_NBYTES = 20 << 10
"""Resident memory that each point of a page's lines takes in addition, over all figures together."""


def check_page(option: str, path: Path, outside: Path | None = None) -> None:
    """Refuse a page that cannot be drawn or written.

    Parameters
    ----------
    option
        The name of the option that asked for it.
    outside
        A directory that is verified as a whole, so the page may not lie in it.

    Raises
    ------
    InputError
        If the library is missing, or the file has the wrong name or place.
    """
    require_library(option)
    shown = f"{option} {printable(path)}"
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{shown}: is not the name of a page: choose one that ends in .html")
    if path.is_dir():
        raise InputError(
            f"{shown}: is a directory: name a file in it, such as {printable(path / 'page.html')}"
        )
    folder = path.parent
    if not folder.is_dir():
        raise InputError(
            f"{shown}: there is no directory {printable(folder)}: make it, or choose a different place"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"{shown}: the directory {printable(folder)} is not writable: choose a different place"
        )
    if outside is not None and outside.resolve() in path.resolve().parents:
        raise InputError(f"{shown}: lies in OUT, which holds the model alone: choose a place outside it")


def require_library(what: str) -> None:
    """Refuse to draw if the library is missing.

    Raises
    ------
    InputError
        If it is.
    """
    if find_spec("vl_convert") is None:
        raise InputError(
            f"{printable(what)}: pages are drawn by vl-convert, which is not installed: install it with "
            "`pip install 'streammerge[pages]'`"
        )


def check_memory(option: str, budget: Budget, points: int = 0) -> None:
    """Refuse a budget in which a page cannot be drawn once the buffers are free.

    Parameters
    ----------
    points
        Points of one figure: the number of lines, times the number of layers.

    Raises
    ------
    BudgetError
        If it is too small.
    """
    needed = DRAWING_NBYTES + points * POINT_NBYTES
    if budget.capacity < needed:
        raise BudgetError(
            f"--memory {format_size(budget.total)} is too little for {option}: the process itself needs "
            f"{format_size(budget.reserve)}, drawing {format_size(needed)}; give at least "
            f"{format_at_least(budget.reserve + needed)}",
            budget.reserve + needed,
        )


def write_page(path: Path, page: str) -> None:
    """Write a page; its name appears only when it is complete.

    Raises
    ------
    WorldError
        If it cannot be written.
    """
    write_file(path, page.encode())
