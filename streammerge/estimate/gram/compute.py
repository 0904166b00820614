"""Collect the Gram matrices of a model's linear maps while examples pass through it, layer by layer, into a store.

For a linear map with inputs x_1 .. x_n (one per token), G = (1/n) sum x_t x_t^T, fp32, [inputs, inputs]. It is a mean, so
a model with more examples does not weigh more. Only linear maps inside the layers are collected; the part after the
layers is not run.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streammerge.errors import ModelError, printable
from streammerge.estimate.network.boundary import Boundary
from streammerge.estimate.network.examples import Example, digest
from streammerge.estimate.network.loader import Loader
from streammerge.estimate.network.progress import Progress
from streammerge.estimate.network.resident import Resident
from streammerge.estimate.network.run import Network
from streammerge.estimate.network.settings import StreamSettings
from streammerge.estimate.network.sizing import StageSize, boundary_elements, check_fits, layer_activations
from streammerge.estimate.network.skeleton import Skeleton
from streammerge.estimate.store_run import StoreRun, Written
from streammerge.events import Control
from streammerge.formats.zarr_store import GRAM_ATTRIBUTE
from streammerge.formats.zarr_writer import chunk_runs
from streammerge.io.durable import make_directory
from streammerge.tensors.fingerprint import files_digest

_BLOCK = 1 << 19
"""Number of elements of a product that are added at a time."""


class Products(Resident):
    """The weights of a layer while products of its linear maps' inputs are summed.

    Attributes
    ----------
    sums
        Sums of x x^T over all tokens so far, by weight, fp64 [inputs, inputs].
    """

    def __init__(
        self, loader: Loader, device: torch.device, allowed: Collection[nn.Parameter], where: str
    ) -> None:
        super().__init__(loader, device, allowed, where)
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.tokens: dict[nn.Parameter, int] = {}

    def on_linear(self, parameter: nn.Parameter, inputs: Tensor, output: Tensor, transposed: bool) -> None:
        """Add the products of the inputs; transposed weights are left out, since the regression works on rows."""
        if transposed:
            return
        x = inputs.reshape(-1, inputs.shape[-1])
        n = x.shape[1]
        if parameter not in self.sums:
            self.sums[parameter] = torch.zeros(n, n, dtype=torch.float64, device=self.device)
        step = max(1, _BLOCK // n)
        for first in range(0, n, step):
            self.sums[parameter][first : first + step] += x[:, first : first + step].T @ x
        self.tokens[parameter] = self.tokens.get(parameter, 0) + len(x)


class GramSums:
    """The numbers that a store records for a matrix: sum of magnitudes, largest magnitude, number of zeros."""

    def __init__(self, tensor: str, dtype: str) -> None:
        self._tensor = tensor
        self._parts: list[tuple[float, float]] = []
        self._largest = 0.0
        self._zeros = 0

    def add(self, values: NDArray[Any]) -> None:
        """Take a run of elements into account.

        Raises
        ------
        ModelError
            If one is not finite.
        """
        wide = np.abs(values.reshape(-1).astype(np.float64))
        if not np.isfinite(wide).all():
            raise ModelError(f"Gram matrix of tensor {printable(self._tensor)}: an input is NaN or infinite")
        self._parts.append((float(wide.sum()), float((wide * wide).sum())))
        self._largest = max(self._largest, float(wide.max(initial=0.0)))
        self._zeros += int((wide == 0).sum())

    def values(self) -> dict[str, Any]:
        """Return the numbers to record, after all runs were added."""
        return {
            "sum": sum(p[0] for p in self._parts),
            "square_sum": sum(p[1] for p in self._parts),
            "largest": self._largest,
            "zeros": self._zeros,
        }


def compute_grams(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: Path,
    settings: StreamSettings,
    *,
    overwrite: bool = False,
    control: Control | None = None,
) -> Written:
    """Collect the Gram matrices of `model` over examples into a store; running it again resumes.

    Raises
    ------
    StreammergeError
        See `streammerge.errors`; finished layers are kept for the next run.
    """
    run = StoreRun(model, out, attribute=GRAM_ATTRIBUTE, sums=GramSums, control=control)
    skeleton = Skeleton(run.index)
    taken = settings.read(data, skeleton, run.index, run.control)
    network = Network(skeleton, torch.device(settings.device))
    _check_memory(settings, skeleton, taken, network.width(taken[-1]))
    identity = {"files": files_digest(run.index.stamps), "examples": digest(taken), "kind": "gram"}
    with run.writing(identity, overwrite):
        make_directory(run.work)
        names = _Collection(run, network, taken, settings).run()
        about = {
            "examples": len(taken),
            "tokens": sum(example.length for example in taken),
            "max_length": settings.max_length,
            "data": identity["examples"],
        }
        return run.finish([name for name in run.index if name in names], about)


class _Collection:
    """Passes all examples through the layers, one layer after the other."""

    def __init__(
        self, run: StoreRun, network: Network, examples: list[Example], settings: StreamSettings
    ) -> None:
        self._network = network
        self._loader = Loader(network.skeleton, run.index, run.reader)
        self._examples = examples
        self._device = torch.device(settings.device)
        self._store = run.store
        self._progress = Progress(run.reader, len(run.index), run.control)
        lengths = [example.length for example in examples]
        self._hidden = [
            Boundary(run.work / f"hidden-{i:05}", lengths, settings.batch_size)
            for i in range(network.n_blocks + 1)
        ]
        weights = network.skeleton.blocks.parameters()
        self._progress.total = sum(lengths) * sum(p.numel() for p in weights)

    @torch.no_grad()
    def run(self) -> set[str]:
        """Run the remaining stages; return the tensors that have a matrix."""
        done = max((i for i, hidden in enumerate(self._hidden) if hidden.exists()), default=None)
        if done is None:
            self._embed()
        for i in range(self._network.n_blocks):
            if done is not None and i < done:
                self._progress.tick(self._cost(i, sum(example.length for example in self._examples)))
            else:
                self._layer(i)
        names = {
            name
            for block in self._network.skeleton.blocks
            for p in block.parameters()
            for name in self._loader.parts(p, p)
        }
        return {name for name in names if self._store.known(name)}

    def _embed(self) -> None:
        weights = Resident(
            self._loader, self._device, self._network.skeleton.outer, "the part before the layers"
        )
        with self._hidden[0].writing() as out:
            for example in self._examples:
                out.add(self._network.embed(example, weights))
                self._progress.tick(0)

    def _layer(self, i: int) -> None:
        weights = Products(
            self._loader, self._device, list(self._network.skeleton.blocks[i].parameters()), f"layer {i}"
        )
        with self._hidden[i].reading() as given, self._hidden[i + 1].writing() as out:
            for n, example in enumerate(self._examples):
                call = self._network.call(i, example)
                hidden = given.rows(n).view(call.hidden.shape).to(self._device)
                out.add(self._network.block(i, hidden, call, weights))
                self._progress.tick(self._cost(i, example.length))
            for parameter, sums in weights.sums.items():
                self._write(parameter, sums / weights.tokens[parameter])
        self._hidden[i].remove()

    def _write(self, parameter: nn.Parameter, mean: Tensor) -> None:
        values = mean.float().cpu().numpy().reshape(-1)
        for name, window in self._loader.parts(parameter, parameter).items():
            if tuple(window.shape) == tuple(parameter.shape) and not self._store.known(name):
                shape = tuple(mean.shape)
                self._store.write(name, shape, "F32", (values[a:b] for a, b in chunk_runs(shape)))
                self._progress.wrote(values.nbytes)

    def _cost(self, i: int, tokens: int) -> int:
        return tokens * sum(p.numel() for p in self._network.skeleton.blocks[i].parameters())


def _check_memory(settings: StreamSettings, skeleton: Skeleton, examples: list[Example], width: int) -> None:
    heads = getattr(skeleton.model.config.get_text_config(), "num_attention_heads", 1)
    stages = []
    for i, block in enumerate(skeleton.blocks):
        weights = list(block.parameters())
        matrices = sum(p.shape[1] ** 2 for p in weights if p.dim() == 2)
        activations = layer_activations([p.shape for p in weights], examples[-1].length, width, heads, 1)
        # Weights are fp32 and have no sums here; matrices are fp64.
        stages.append(
            StageSize(
                f"layer {i}",
                0,
                whole=sum(p.numel() for p in weights) // 2,
                row_sums=matrices // 2 + 1,
                activations=activations,
            )
        )
    check_fits(settings.memory, stages, boundary_elements(settings.batch_size, examples[-1].length, width, 1))
