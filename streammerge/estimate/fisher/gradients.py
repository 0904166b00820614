"""Per-example gradients of one stage's parameters, squared as they are computed.

The weight of a linear map has the gradient ``outputs' gradients.T @ inputs``. Both factors are kept, and the gradient is
formed block by block. An embedding has gradients for the rows that were looked up. Parameters used in any other way
(norms, biases, convolutions, fused experts) get their gradient from autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import field

import torch
from torch import Tensor, nn

from streammerge.errors import ModelError, printable
from streammerge.estimate.fisher.squares import RowSquares, Squares
from streammerge.estimate.network.live import distinct
from streammerge.estimate.network.loader import Loader
from streammerge.estimate.network.resident import Resident
from streammerge.records import dataclass


@dataclass
class _Product:
    """One use of a linear map's weight."""

    inputs: Tensor
    transposed: bool
    version: int
    """Version of the inputs when they were used; autograd does not check it for a weight without a gradient."""
    output_gradient: Tensor | None = None
    """Gradient of the outputs for the current score; None before backpropagation."""

    def take(self, gradient: Tensor) -> None:
        """Store the gradient of the outputs."""
        self.output_gradient = gradient

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return `left` and `right`; the weight's gradient is ``left.T @ right``."""
        assert self.output_gradient is not None
        outputs = self.output_gradient.reshape(-1, self.output_gradient.shape[-1])
        inputs = self.inputs.reshape(-1, self.inputs.shape[-1])
        return (inputs, outputs) if self.transposed else (outputs, inputs)


@dataclass
class _Lookup:
    """One lookup in an embedding."""

    ids: Tensor
    """The distinct ids."""
    table: Tensor
    """The rows of the ids, a leaf of the graph."""


@dataclass
class TiedRows:
    """The rows of a tied weight that an example's tokens look up; both uses contribute to their gradient.

    The square is that of the sum, so the linear map leaves these rows out and passes its part on to the embedding.
    """

    ids: Tensor
    """The example's distinct tokens, ascending."""
    gradients: list[Tensor] = field(default_factory=list)
    """The linear map's part for each score, fp32 [len(ids), width]."""


class _UsedOtherwise(Exception):
    """A weight treated as a linear map's turned out to have other uses; the example is run again."""


class Gradients(Resident):
    """The weights of one stage while their squared gradients are summed.

    Parameters
    ----------
    tied
        Embeddings that are used as linear maps after the layers.

    Attributes
    ----------
    dense, rows
        The sums by parameter: of the whole parameter, or of the rows that were looked up.
    """

    def __init__(
        self,
        loader: Loader,
        device: torch.device,
        allowed: Collection[nn.Parameter],
        where: str,
        tied: Collection[nn.Parameter] = (),
    ) -> None:
        super().__init__(loader, device, allowed, where)
        self._tied = set(tied)
        self._whole: set[nn.Parameter] = set()
        self._products: dict[nn.Parameter, list[_Product]] = {}
        self._lookups: list[tuple[nn.Parameter, _Lookup]] = []
        self.dense: dict[nn.Parameter, Squares] = {}
        self.rows: dict[nn.Parameter, RowSquares] = {}

    # Called by the model.

    def value(self, parameter: nn.Parameter) -> Tensor:
        """Return a parameter's values; they are read at the first request."""
        if parameter not in self.values:
            super().value(parameter)
            self.dense[parameter] = Squares(parameter.shape, self.device)
            if parameter.dim() != 2:
                self._take_whole(parameter)
        return self.values[parameter]

    def lookup(self, parameter: nn.Parameter, ids: Tensor, padding: int | None) -> Tensor:
        """Return rows of an embedding; the padding token's row has no gradient."""
        found, places = distinct(ids)
        table = self._loader.rows(parameter, found.cpu()).to(self.device).requires_grad_(True)
        self._lookups.append((parameter, _Lookup(found, table)))
        rows = table[places]
        return rows if padding is None else torch.where((ids == padding)[..., None], rows.detach(), rows)

    def on_linear(self, parameter: nn.Parameter, inputs: Tensor, output: Tensor, transposed: bool) -> None:
        """Store a linear map's inputs, and let autograd deliver the gradients of its outputs."""
        if parameter in self._whole:
            return
        if not output.requires_grad:  # autograd would skip it
            self.on_other(parameter)
        product = _Product(inputs.detach(), transposed, inputs._version)
        output.register_hook(product.take)  # type: ignore[no-untyped-call]
        self._products.setdefault(parameter, []).append(product)

    def on_other(self, parameter: nn.Parameter) -> None:
        """Let autograd compute this parameter's gradient from now on."""
        if parameter not in self._whole:
            self._take_whole(parameter)
            raise _UsedOtherwise

    def _take_whole(self, parameter: nn.Parameter) -> None:
        self._whole.add(parameter)
        self.values[parameter].requires_grad_(True)

    # Called by the estimate.

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        """Return the output of a stage for an example, and keep everything that its gradients need."""
        while True:
            self._products.clear()
            self._lookups.clear()
            try:
                with torch.enable_grad():
                    output = run()
            except _UsedOtherwise:
                continue
            for parameter, uses in self._products.items():
                if any(one.inputs._version != one.version for one in uses):
                    raise ModelError(
                        f"{printable(self._loader.reference)}: {self._where} changes the inputs of "
                        f"{printable(self._loader.name(parameter))} in place, so its gradient cannot be computed"
                    )
            return output

    def backward(
        self, output: Tensor, scores: Sequence[Tensor], hidden: Tensor | None, tied: TiedRows | None = None
    ) -> list[Tensor]:
        """Add the squares of an example's gradients for each score.

        Parameters
        ----------
        output
            The result of `forward`.
        scores
            Gradients of the log-likelihood with respect to `output`.
        hidden
            The leaf that `output` was computed from.
        tied
            The rows that both uses of a tied weight contribute to.

        Returns
        -------
        list of Tensor
            The gradients with respect to `hidden`, for each score; empty without `hidden`.
        """
        whole = [parameter for parameter in self.values if parameter in self._whole]
        leaves = [*([] if hidden is None else [hidden]), *(self.values[p] for p in whole)]
        leaves += [one.table for _, one in self._lookups]
        passed = []
        for number, score in enumerate(scores):
            for uses in self._products.values():
                for one in uses:
                    one.output_gradient = None
            found = list(
                torch.autograd.grad(
                    output, leaves, score, retain_graph=number + 1 < len(scores), allow_unused=True
                )
            )
            if hidden is not None:
                gradient = found.pop(0)
                passed.append(torch.zeros_like(hidden) if gradient is None else gradient)
            for parameter in whole:
                gradient = found.pop(0)
                if gradient is not None:
                    if parameter in self._tied and tied is not None:
                        tied.gradients.append(gradient[tied.ids])
                        gradient = gradient.index_fill(0, tied.ids, 0.0)
                    self.dense[parameter].add(gradient)
            self._add_products(tied)
            self._add_lookups(found, number, tied)
        self._products.clear()
        self._lookups.clear()
        return passed

    def _add_products(self, tied: TiedRows | None) -> None:
        for parameter, uses in self._products.items():
            pairs = [one.factors() for one in uses if one.output_gradient is not None]
            if not pairs:
                continue
            left, right = pairs[0]
            if len(pairs) > 1:  # several uses have one gradient, the sum over the uses
                left, right = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
            if parameter in self._tied and tied is not None:
                tied.gradients.append(left[:, tied.ids].T @ right)
                left = left.index_fill(1, tied.ids, 0.0)
            self.dense[parameter].add_product(left, right)

    def _add_lookups(self, gradients: Sequence[Tensor | None], score: int, tied: TiedRows | None) -> None:
        met: dict[nn.Parameter, list[tuple[Tensor, Tensor]]] = {}
        for (parameter, one), gradient in zip(self._lookups, gradients, strict=True):
            if gradient is not None:
                met.setdefault(parameter, []).append((one.ids, gradient))
        for parameter, pairs in met.items():
            ids, gradient = pairs[0]
            if len(pairs) > 1:
                ids, places = distinct(torch.cat([pair[0] for pair in pairs]))
                gradient = gradient.new_zeros(len(ids), gradient.shape[1])
                gradient.index_add_(0, places, torch.cat([pair[1] for pair in pairs]))
            if parameter in self._tied and tied is not None:
                if not torch.equal(ids, tied.ids):
                    raise ModelError(
                        f"{printable(self._loader.reference)}: the tied embedding is looked up for ids other than the example's tokens, which is not supported"
                    )
                gradient = gradient + tied.gradients[score]
            if parameter not in self.rows:
                self.rows[parameter] = RowSquares(parameter.shape[1], self.device)
            self.rows[parameter].add(ids, gradient)
