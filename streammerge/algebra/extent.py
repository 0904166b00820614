"""`Extent`: how much of a tensor or model must be seen at once, for rules, statistics and methods alike."""

from __future__ import annotations

from enum import StrEnum


class Extent(StrEnum):
    """The elements that must be processed together: element < row, column < tensor < model.

    A row runs along the last axis, a column along the first.
    """

    ELEMENT = "elementwise"
    """Each element independently: a tensor may be cut anywhere."""
    ROW = "row"
    """Whole rows: a tensor may be cut between them."""
    COLUMN = "column"
    """Whole columns: a tensor may be cut between rows, which depend on each other through statistics only."""
    TENSOR = "tensor"
    """All of one tensor."""
    MODEL = "model"
    """All tensors of the merge."""

    @property
    def is_line(self) -> bool:
        """Whether it is ROW or COLUMN."""
        return self in (Extent.ROW, Extent.COLUMN)
