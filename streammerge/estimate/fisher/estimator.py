"""The passes of an estimate: forward stage by stage, then backward, each stage from files to files.

::

    examples ─► embed ─► layer 0 ─► … ─► layer L-1 ─► head      forward: hidden i is the input of layer i
                  ▲         ▲                 ▲         │       backward: gradient i is with respect to hidden i
                  └─────────┴── gradients ────┴─────────┘

A stage is done when its output file has its final name. Only then are its input files removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from streammerge.errors import ModelError, printable
from streammerge.estimate.fisher.gradients import Gradients, TiedRows
from streammerge.estimate.fisher.labels import Labels, label_scores, n_scores, token_scores
from streammerge.estimate.fisher.squares import RowSquares, Squares
from streammerge.estimate.network.boundary import Boundary
from streammerge.estimate.network.examples import Example
from streammerge.estimate.network.loader import Loader
from streammerge.estimate.network.resident import Resident
from streammerge.estimate.network.run import Network
from streammerge.estimate.network.skeleton import CAUSAL, Skeleton
from streammerge.io.durable import fsync_directory, make_directory, world_errors, write_file
from streammerge.records import dataclass

BEFORE, AFTER = "the part before the layers", "the part after the layers"
_SAME_LENGTH_CHECKS = 8


@dataclass(frozen=True)
class Estimate:
    """The quantity to estimate."""

    examples: Sequence[Example]
    """The examples, shortest first."""
    labels: Labels
    seed: int


@dataclass(frozen=True)
class Place:
    """The folder and device of an estimate."""

    directory: Path
    """Folder of the files that pass between stages."""
    batch_size: int
    """Number of examples that are read and written at a time."""
    device: torch.device


Write = Callable[[nn.Parameter, "Squares | RowSquares | None", Path | None], None]
"""Writes the sums of a parameter (None: no example touched it); the file at the path holds fp64 sums of rows to add."""
Tick = Callable[[int], None]
"""Receives the work done, in parameters times tokens; raises to stop the estimate."""


class Estimator:
    """Runs the passes in a directory that keeps the files between stages.

    Parameters
    ----------
    write
        Called for every parameter of a stage once its sums are complete. Calling it twice is safe.
    tick
        Called after every example of a stage, with the work it took.

    Raises
    ------
    ModelError
        If the model cannot be run stage by stage.
    """

    def __init__(
        self,
        network: Network,
        loader: Loader,
        estimate: Estimate,
        place: Place,
        write: Write,
        tick: Tick,
    ) -> None:
        self._network = network
        self._loader = loader
        self._estimate = estimate
        self._directory = place.directory
        self._batch_size = place.batch_size
        self._device = place.device
        self._write = write
        self._tick = tick
        skeleton = network.skeleton
        self._skeleton: Skeleton = skeleton
        self._n_scores = n_scores(estimate.labels, skeleton.kind, skeleton.n_labels)
        # Cost of a backward stage relative to a forward one: it runs forward again, and each score needs two more products.
        self._cost = 1 + 2 * self._n_scores
        self._blocks = [list(dict.fromkeys(block.parameters())) for block in skeleton.blocks]
        owned = [parameter for block in self._blocks for parameter in block]
        if len(set(owned)) < len(owned):
            raise ModelError(
                f"{printable(loader.reference)}: its layers share parameters; running such models layer by layer is not supported"
            )
        self._embeddings = skeleton.embeddings
        lengths = [example.length for example in estimate.examples]
        scored = [self._n_scores * length for length in lengths]
        self._hidden = [self._boundary(f"hidden-{i:05}", lengths) for i in range(network.n_blocks + 1)]
        self._gradient = [self._boundary(f"gradient-{i:05}", scored) for i in range(network.n_blocks + 1)]
        self._ids = [torch.from_numpy(np.unique(example.ids)) for example in estimate.examples]
        self._tied_rows = self._boundary("tied-rows", [self._n_scores * len(ids) for ids in self._ids])
        self._tied_sums = self._directory / "tied-sums"
        self._head_done = self._directory / "head.json"

    @property
    def total_work(self) -> int:
        """The work of a whole estimate, in the units of `tick`."""
        tokens = sum(example.length for example in self._estimate.examples)
        layers = sum(self._work(block, 1) for block in self._blocks)
        return tokens * ((1 + self._cost) * layers + self._cost * self._work(self._skeleton.outer, 1))

    def run(self) -> None:
        """Run every stage that is not done."""
        make_directory(self._directory)
        last = self._network.n_blocks
        if last == 1:
            self._run_first_example()
        begun = next((i for i in range(last + 1) if self._gradient[i].exists()), None)
        if begun is None:
            self._forward()
            self._head()
            begun = last
        else:
            self._skip_to(begun)
        for i in range(begun - 1, -1, -1):
            self._backward(i)
        self._embed_backward()

    @torch.no_grad()
    def _run_first_example(self) -> None:
        """Let the network learn the structure of a single layer's result, which no second layer reveals."""
        example = self._estimate.examples[0]
        before = Resident(self._loader, self._device, self._skeleton.outer, BEFORE)
        layer = Resident(self._loader, self._device, self._blocks[0], "layer 0")
        self._network.block(0, self._network.embed(example, before), self._network.call(0, example), layer)

    # Forward.

    def _forward(self) -> None:
        done = max((i for i, hidden in enumerate(self._hidden) if hidden.exists()), default=None)
        if done is None:
            self._embed()
            done = 0
        for i in range(done):
            self._tick_stage(self._blocks[i], 1)
        for i in range(done, self._network.n_blocks):
            self._layer(i)

    @torch.no_grad()
    def _embed(self) -> None:
        weights = Resident(self._loader, self._device, self._skeleton.outer, BEFORE)
        before: Example | None = None
        checks = _SAME_LENGTH_CHECKS
        with self._hidden[0].writing() as out:
            for example in self._estimate.examples:
                if before is not None and before.length == example.length and checks:
                    self._network.check_by_length(before, example)
                    checks -= 1
                out.add(self._network.embed(example, weights))
                self._tick(0)
                before = example

    @torch.no_grad()
    def _layer(self, i: int) -> None:
        weights = Resident(self._loader, self._device, self._blocks[i], f"layer {i}")
        with self._hidden[i].reading() as given, self._hidden[i + 1].writing() as out:
            for n, example in enumerate(self._estimate.examples):
                call = self._network.call(i, example)
                hidden = given.rows(n).view(call.hidden.shape).to(self._device)
                out.add(self._network.block(i, hidden, call, weights))
                self._tick(self._work(self._blocks[i], example.length))

    # Backward.

    def _head(self) -> None:
        last = self._network.n_blocks
        weights = Gradients(self._loader, self._device, self._skeleton.outer, AFTER, self._embeddings)
        with (
            self._hidden[last].reading() as given,
            self._gradient[last].writing() as out,
            self._tied_rows.writing() as tied_out,
        ):
            for n, example in enumerate(self._estimate.examples):
                shape = self._network.call(last - 1, example).hidden.shape
                hidden = given.rows(n).view(shape).to(self._device).requires_grad_(True)
                logits = weights.forward(partial(self._network.head, example, hidden, weights))
                tied = TiedRows(self._ids[n].to(self._device))
                for gradient in weights.backward(
                    logits, self._scores(logits.detach(), example), hidden, tied
                ):
                    out.add(gradient)
                for gradient in tied.gradients:
                    tied_out.add(gradient)
                self._tick(self._work(self._skeleton.outer, example.length, self._cost))
            self._finish_head(weights)
        self._hidden[last].remove()

    def _finish_head(self, weights: Gradients) -> None:
        """Write the sums of the parameters after the layers, and their names."""
        tied = [parameter for parameter in self._embeddings if parameter in weights.dense]
        if len(tied) > 1 or weights.rows:
            names = ", ".join(self._skeleton.name(p) for p in (*tied, *weights.rows))
            raise ModelError(
                f"{printable(self._loader.reference)}: {AFTER} uses the embeddings {printable(names)}"
            )
        for parameter, squares in weights.dense.items():
            if parameter not in set(tied):
                self._write(parameter, squares, None)
        if tied:
            with world_errors(self._tied_sums), self._tied_sums.open("wb") as file:
                weights.dense[tied[0]].sums.cpu().numpy().tofile(file)
                file.flush()
                os.fsync(file.fileno())
        used = {
            "used": [self._skeleton.name(p) for p in weights.dense],
            "tied": self._skeleton.name(tied[0]) if tied else None,
        }
        write_file(self._head_done, json.dumps(used).encode())
        fsync_directory(self._directory)

    def _scores(self, logits: Tensor, example: Example) -> list[Tensor]:
        estimate = self._estimate
        if self._skeleton.kind == CAUSAL:
            return [token_scores(logits, example, estimate.labels, estimate.seed)]
        return label_scores(logits, example, estimate.labels, estimate.seed)

    def _backward(self, i: int) -> None:
        weights = Gradients(self._loader, self._device, self._blocks[i], f"layer {i}")
        with (
            self._hidden[i].reading() as given,
            self._gradient[i + 1].reading() as wanted,
            self._gradient[i].writing() as out,
        ):
            for n, example in enumerate(self._estimate.examples):
                call = self._network.call(i, example)
                hidden = given.rows(n).view(call.hidden.shape).to(self._device).requires_grad_(True)
                output = weights.forward(partial(self._network.block, i, hidden, call, weights))
                scores = [score.view(output.shape) for score in self._per_score(wanted.rows(n))]
                for gradient in weights.backward(output, scores, hidden):
                    out.add(gradient)
                self._tick(self._work(self._blocks[i], example.length, self._cost))
            for parameter in self._blocks[i]:
                self._write(parameter, weights.dense.get(parameter), None)
        self._gradient[i + 1].remove()
        self._hidden[i].remove()

    def _embed_backward(self) -> None:
        head = json.loads(self._head_done.read_bytes())
        by_name = {self._skeleton.name(p): p for p in self._skeleton.outer}
        used = {by_name[name] for name in head["used"]}
        tied = by_name.get(head["tied"])
        allowed = [p for p in self._skeleton.outer if p not in used]
        weights = Gradients(self._loader, self._device, allowed, BEFORE, [tied] if tied is not None else [])
        with self._gradient[0].reading() as wanted, self._tied_rows.reading() as tied_given:
            for n, example in enumerate(self._estimate.examples):
                ids = self._ids[n].to(self._device)
                rows = None
                if tied is not None:
                    rows = TiedRows(ids, self._per_score(tied_given.rows(n)))
                output = weights.forward(partial(self._network.embed, example, weights))
                weights.backward(
                    output, [s.view(output.shape) for s in self._per_score(wanted.rows(n))], None, rows
                )
                self._tick(0)
        for parameter in self._skeleton.outer:
            if parameter in weights.dense and parameter in weights.rows:
                raise ModelError(
                    f"{printable(self._loader.reference)}: {printable(self._skeleton.name(parameter))} is used before the layers "
                    "both as an embedding and otherwise, which is not supported"
                )
            if parameter is tied:
                self._write(parameter, weights.rows.get(parameter), self._tied_sums)
            elif parameter not in used:
                self._write(parameter, weights.rows.get(parameter) or weights.dense.get(parameter), None)

    # Small parts.

    def _boundary(self, name: str, rows: Sequence[int]) -> Boundary:
        return Boundary(self._directory / name, rows, self._batch_size)

    def _per_score(self, rows: Tensor) -> list[Tensor]:
        return list(rows.to(self._device).chunk(self._n_scores))

    @staticmethod
    def _work(parameters: Sequence[nn.Parameter], tokens: int, cost: int = 1) -> int:
        return cost * tokens * sum(p.numel() for p in parameters)

    def _tick_stage(self, parameters: Sequence[nn.Parameter], cost: int) -> None:
        self._tick(self._work(parameters, sum(example.length for example in self._estimate.examples), cost))

    def _skip_to(self, begun: int) -> None:
        """Count the work of finished stages: all forward stages, and backward stages down to `begun`."""
        for block in self._blocks:
            self._tick_stage(block, 1)
        self._tick_stage(self._skeleton.outer, self._cost)
        for block in self._blocks[begun:]:
            self._tick_stage(block, self._cost)
