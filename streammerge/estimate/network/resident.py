"""The weights of one stage, read at the first request and kept until the stage ends."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from streammerge.errors import ModelError, printable
from streammerge.estimate.network.live import Weights, distinct
from streammerge.estimate.network.loader import Loader


class Resident(Weights):
    """The weights of a stage; embeddings are read row by row.

    Parameters
    ----------
    allowed
        Parameters that the stage may use.
    where
        The stage's name in messages.

    Attributes
    ----------
    values
        The weights read so far.
    """

    def __init__(
        self, loader: Loader, device: torch.device, allowed: Collection[nn.Parameter], where: str
    ) -> None:
        super().__init__(device)
        self._loader = loader
        self._allowed = set(allowed)
        self._where = where
        self.values: dict[nn.Parameter, Tensor] = {}

    def value(self, parameter: nn.Parameter) -> Tensor:
        """Return a parameter's values.

        Raises
        ------
        ModelError
            If it belongs to a different stage.
        """
        if parameter not in self.values:
            if parameter not in self._allowed:
                raise ModelError(
                    f"{printable(self._loader.reference)}: {self._where} uses {printable(self._loader.name(parameter))}, which "
                    "belongs to a different part; running such models layer by layer is not supported"
                )
            self.values[parameter] = self._loader.load(parameter).to(self.device)
        return self.values[parameter]

    def lookup(self, parameter: nn.Parameter, ids: Tensor, padding: int | None) -> Tensor:
        """Return rows of an embedding."""
        found, places = distinct(ids)
        return self._loader.rows(parameter, found.cpu()).to(self.device)[places]
