"""Sums of squared per-example gradients: squares are taken before the sum over examples.

The sums are fp64, since thousands of small squares would be lost in a large fp32 sum. Every element adds in the order
of the examples, so the bits do not depend on how the work is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streammerge.numerics.compiled import is_compiled

_BLOCK = 1 << 19
"""Number of elements of a gradient that are computed, squared and added while they are in the cache."""


class Squares:
    """Sums of the squares of one parameter's gradients.

    Attributes
    ----------
    sums
        fp64, of the parameter's shape.
    """

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)

    @property
    def dense(self) -> Tensor:
        """The sums of every element, fp64 of the parameter's shape."""
        return self.sums

    def row(self, i: int) -> Tensor:
        """Return the sums of row `i`."""
        return self.sums[i]

    def add(self, gradient: Tensor) -> None:
        """Add the squares of a whole gradient, fp32 of the parameter's shape."""
        _add_squares(self.sums.view(-1), gradient.contiguous().view(-1))

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add the squares of ``left.T @ right``, the gradient of a linear map, a few rows at a time.

        Parameters
        ----------
        left, right
            fp32 [tokens, rows] and [tokens, columns]: the gradients of its outputs and its inputs; swapped if the weight
            is stored transposed.
        """
        n_rows, n_columns = self.sums.shape
        step = max(1, _BLOCK // n_columns)
        buffer = torch.empty(min(step, n_rows), n_columns, device=self.sums.device)
        for first in range(0, n_rows, step):
            some = left[:, first : first + step].T
            block = torch.mm(some, right, out=buffer[: len(some)])
            _add_squares(self.sums[first : first + step].view(-1), block.view(-1))


class RowSquares:
    """Sums of squares for an embedding, of which an example touches few rows.

    Attributes
    ----------
    ids
        The touched rows, in order of first use.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.ids: list[int] = []
        self._places: dict[int, int] = {}
        self._sums = torch.zeros(0, width, dtype=torch.float64, device=device)

    @property
    def dense(self) -> None:
        """None: only touched rows have sums."""
        return

    def add(self, ids: Tensor, gradients: Tensor) -> None:
        """Add the squares of the gradients of some rows, fp32 [len(ids), width]; ids are distinct."""
        for i in ids.tolist():
            if i not in self._places:
                self._places[i] = len(self.ids)
                self.ids.append(i)
        if len(self.ids) > len(self._sums):
            grown = torch.zeros(
                len(self.ids) * 5 // 4 + 16,
                self._sums.shape[1],
                dtype=torch.float64,
                device=self._sums.device,
            )
            grown[: len(self._sums)] = self._sums
            self._sums = grown
        places = torch.tensor([self._places[i] for i in ids.tolist()], device=self._sums.device)
        self._sums.index_add_(0, places, gradients.double().square_())

    def row(self, i: int) -> Tensor | None:
        """Return the sums of row `i`, fp64 [width]; None if no example touched it."""
        place = self._places.get(i)
        return None if place is None else self._sums[place]


def _add_squares(sums: Tensor, values: Tensor) -> None:
    if sums.device.type == "cpu" and is_compiled("diagonals"):
        from streammerge.kernels.squares import add_squares

        add_squares(sums.numpy(), values.detach().numpy())
    else:
        sums.add_(values.double().square_())
