"""How much of a tensor, or of a model, must be seen at once: the one scale that rules, statistics and methods use."""

from __future__ import annotations

from enum import StrEnum


class Extent(StrEnum):
    """The elements that must be in memory, or counted, together: element < row and column < tensor < model.

    A row lies along the last axis, a column along the first.
    """

    ELEMENT = "elementwise"
    """Each element by itself: a tensor may be cut anywhere."""
    ROW = "row"
    """Whole rows: a tensor may be cut between them."""
    COLUMN = "column"
    """Every column, of however many rows: cut between rows, but the rows depend on each other through statistics."""
    TENSOR = "tensor"
    """All of one tensor."""
    MODEL = "model"
    """All tensors of the merge."""

    @property
    def is_line(self) -> bool:
        """True for a row and for a column."""
        return self in (Extent.ROW, Extent.COLUMN)
