"""The columns of the progress bar, as many as fit the terminal; none changes the width of the bar."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

_SMOOTHED_SECONDS = 30.0
_MARGIN = 3
"""Columns left free on the right, so that the ^C that a terminal echoes does not wrap the line."""
_RATE_FROM, _READ_FROM, _ALL_FROM = 72, 96, 136
"""Terminal widths from which more columns fit next to a bar of 20 cells."""


class _TimeLeft(TimeRemainingColumn):
    """Rich's estimate, with a word that says what it is."""

    def render(self, task: Task) -> Text:
        left = super().render(task)
        return left.append(" left") if left.plain else left


class FittingProgress(Progress):
    """A display whose columns follow the width of the terminal.

    Its tasks have the fields `rate`, `read`, `written` and `memory`.
    """

    def __init__(self, console: Console) -> None:
        self._terminal = console
        super().__init__(
            console=console, transient=True, expand=True, speed_estimate_period=_SMOOTHED_SECONDS
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the line, in the columns that the terminal has room for now."""
        self.columns = columns_for(self._terminal.width)
        yield Padding(self.make_tasks_table(self.tasks), (0, _MARGIN, 0, 0))


@cache
def columns_for(width: int) -> tuple[ProgressColumn, ...]:
    """Return the columns for a terminal of this width, by priority: task, bar, percent, time left; rate; sizes; memory."""
    columns: list[ProgressColumn] = [
        _text("{task.description}", 10, "left"),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=20)),
        TaskProgressColumn(table_column=Column(width=4, no_wrap=True, justify="right")),
        _TimeLeft(table_column=Column(width=12, no_wrap=True, justify="right")),
    ]
    if width >= _RATE_FROM:
        columns.append(_text("{task.fields[rate]}", 10, "right"))
    if width >= _READ_FROM:
        columns.append(_text("{task.fields[read]}", 23, "left"))
    if width >= _ALL_FROM:
        columns += [_text("{task.fields[written]}", 24, "left"), _text("{task.fields[memory]}", 25, "left")]
    return tuple(columns)


def _text(template: str, width: int, justify: str) -> TextColumn:
    column = Column(width=width, no_wrap=True, justify="right" if justify == "right" else "left")
    return TextColumn(template, markup=False, table_column=column)
