"""Estimate the Fisher diagonal of a model larger than memory, layer by layer, into a store.

Each weight is read twice, whatever the number of examples: once when all examples pass forward through its layer, once
when their gradients pass backward. Memory holds one layer, its sums of squares in fp64, and one example's activations.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streammerge.backends.cpu.before_use import compile_groups
from streammerge.checkpoint.index import TensorIndex
from streammerge.dtypes import FLOATS
from streammerge.errors import WorldError, printable
from streammerge.estimate.fisher.estimator import AFTER, BEFORE, Estimate, Estimator, Place
from streammerge.estimate.fisher.labels import choose, n_scores
from streammerge.estimate.fisher.squares import RowSquares, Squares
from streammerge.estimate.fisher.sums import DiagonalSums
from streammerge.estimate.network.examples import Example, digest
from streammerge.estimate.network.loader import Loader
from streammerge.estimate.network.progress import Progress
from streammerge.estimate.network.run import Network
from streammerge.estimate.network.settings import StreamSettings
from streammerge.estimate.network.sizing import (
    StageSize,
    boundary_elements,
    check_fits,
    head_activations,
    layer_activations,
)
from streammerge.estimate.network.skeleton import CAUSAL, CLASSIFIER, Skeleton
from streammerge.estimate.store_run import StoreRun, Written
from streammerge.events import Control
from streammerge.formats.zarr_store import ATTRIBUTE
from streammerge.formats.zarr_writer import StoreWriter, chunk_runs
from streammerge.io.durable import make_directory
from streammerge.numerics.casts import to_store
from streammerge.records import dataclass
from streammerge.tensors.fingerprint import files_digest
from streammerge.units import format_size


@dataclass(frozen=True, kw_only=True)
class Settings(StreamSettings):
    """Settings of an estimate of a Fisher diagonal."""

    labels: str | None = None
    """``sampled``, ``empirical`` or ``exact`` (see `fisher.labels`); None: exact for a classifier, else sampled."""
    seed: int = 0
    """Seed for drawing labels."""
    dtype: str = "F32"
    """Dtype of the stored values: F32 or BF16. All arithmetic is fp32, all sums fp64."""


def compute_diagonal(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: Path,
    settings: Settings,
    *,
    overwrite: bool = False,
    control: Control | None = None,
) -> Written:
    """Estimate the diagonal of `model` over examples into a store; running it again resumes.

    Parameters
    ----------
    data
        A file of JSON lines, see `network.examples`.

    Raises
    ------
    StreammergeError
        See `streammerge.errors`; finished stages are kept for the next run.
    """
    run = StoreRun(model, out, attribute=ATTRIBUTE, sums=DiagonalSums, control=control)
    skeleton = Skeleton(run.index)
    labels = choose(settings.labels, skeleton.kind)
    own_labels = skeleton.kind == CLASSIFIER and labels == "empirical"
    taken = settings.read(data, skeleton, run.index, run.control, with_labels=own_labels)
    compile_groups(("adapters", "diagonals"), run.control)
    network = Network(skeleton, torch.device(settings.device))
    scores = n_scores(labels, skeleton.kind, skeleton.n_labels)
    width = network.width(taken[-1])
    check_fits(
        settings.memory,
        list(_stages(skeleton, taken, width)),
        boundary_elements(settings.batch_size, taken[-1].length, width, scores),
    )
    identity = {
        "files": files_digest(run.index.stamps),
        "dtype": settings.dtype,
        "examples": digest(taken),
        "labels": labels,
        "seed": str(settings.seed),
    }
    with run.writing(identity, overwrite):
        if not run.work.exists():
            n_hidden = sum(example.length for example in taken) * width
            _check_disk(run.work, network.n_blocks, n_hidden, scores, run.index)
        loader = Loader(skeleton, run.index, run.reader)
        order, missing = _estimate(run, loader, network, settings, Estimate(taken, labels, settings.seed))
        about = _about(skeleton, settings, taken, identity)
        return run.finish(order, {**about, "missing": missing})


def _estimate(
    run: StoreRun, loader: Loader, network: Network, settings: Settings, estimate: Estimate
) -> tuple[list[str], list[str]]:
    """Run the stages that are not done; return the tensors that have a diagonal, and the floating ones that have none."""
    skeleton, index, store = network.skeleton, run.index, run.store
    progress = Progress(run.reader, len(index), run.control)
    results = _Results(store, loader, len(estimate.examples), settings.dtype, progress)
    place = Place(run.work, settings.batch_size, torch.device(settings.device))
    estimator = Estimator(network, loader, estimate, place, results.write, progress.tick)
    progress.total = estimator.total_work
    names = {name for parameter in skeleton.aliases for name in loader.parts(parameter, parameter)}
    order = [name for name in index if name in names]
    known = [store.known(name) for name in order]  # called for every tensor: the store then lists it
    if not all(known):  # else it was stopped just before the store had its name
        estimator.run()
    missing = [name for name, ref in index.items() if name not in names and ref.dtype in FLOATS]
    if missing:
        run.control.warn(
            f"{len(missing)} tensors of {printable(index.reference)} are not parameters of "
            f"{type(skeleton.model).__name__} (first: {printable(missing[0])}); they get no diagonal"
        )
    return order, missing


def _about(
    skeleton: Skeleton, settings: Settings, taken: list[Example], identity: Mapping[str, str]
) -> dict[str, Any]:
    """Return the store's record of the estimate."""
    return {
        "estimator": identity["labels"],
        "kind": skeleton.kind,
        "examples": len(taken),
        "seed": settings.seed,
        "tokens": sum(example.length for example in taken),
        "max_length": settings.max_length,
        "data": identity["examples"],
        "dtype": settings.dtype,
    }


def _stages(skeleton: Skeleton, examples: list[Example], width: int) -> Iterator[StageSize]:
    """Yield the sizes of the stages, for the longest example."""
    config = skeleton.model.config.get_text_config()
    heads, used = getattr(config, "num_attention_heads", 1), getattr(config, "num_experts_per_tok", 1) or 1
    tokens = examples[-1].length
    ids = len(np.unique(np.concatenate([example.ids for example in examples])))
    for i, block in enumerate(skeleton.blocks):
        weights = list(block.parameters())
        yield StageSize(
            f"layer {i}",
            sum(p.numel() for p in weights),
            sum(p.numel() for p in weights if p.dim() != 2),
            activations=layer_activations([p.shape for p in weights], tokens, width, heads, used),
        )
    embeddings = set(skeleton.embeddings)
    looked_up = sum(min(len(p), max(ids, tokens)) * p.shape[1] for p in embeddings)
    dense = [p for p in skeleton.outer if p not in embeddings or len(skeleton.aliases[p]) > 1]
    choices = skeleton.vocabulary if skeleton.kind == CAUSAL else skeleton.n_labels
    yield StageSize(
        AFTER, sum(p.numel() for p in dense), activations=head_activations(tokens, choices, width)
    )
    others = sum(p.numel() for p in skeleton.outer if p not in embeddings)
    yield StageSize(BEFORE, others, row_sums=looked_up, activations=16 * tokens * width)


def _check_disk(work: Path, n_blocks: int, elements: int, scores: int, index: TensorIndex) -> None:
    """Refuse an estimate whose hidden states, two sets of gradients and store do not fit on the disk."""
    make_directory(work.parent)
    needed = 4 * (elements * (n_blocks + 1 + 2 * scores) + sum(ref.n_elements for ref in index.values()))
    free = shutil.disk_usage(work.parent).free
    if needed > free:
        raise WorldError(
            f"{printable(work.parent)}: the hidden states between the layers and the store need {format_size(needed)}, "
            f"{format_size(free)} are free: free some space, or take fewer or shorter examples"
        )


class _Results:
    """Writes means of squares under the checkpoint's names."""

    def __init__(self, store: StoreWriter, loader: Loader, n: int, dtype: str, progress: Progress) -> None:
        self._store = store
        self._loader = loader
        self._n = n
        self._dtype = dtype
        self._progress = progress

    def write(self, parameter: nn.Parameter, squares: Squares | RowSquares | None, base: Path | None) -> None:
        """Write the diagonal of a parameter, unless an earlier run has."""
        dense = None if squares is None else squares.dense
        for name, window in self._loader.parts(parameter, parameter if dense is None else dense).items():
            if not self._store.known(name):
                shape = tuple(window.shape)
                sums = _sums_of(window) if dense is not None else _sums_of_rows(shape, squares, base)
                self._store.write(name, shape, self._dtype, (self._mean(some) for some in sums))
            self._progress.wrote(window.numel() * (2 if self._dtype == "BF16" else 4))

    def _mean(self, sums: NDArray[np.float64]) -> NDArray[Any]:
        return to_store((sums / self._n).astype(np.float32), "F32", self._dtype)


def _sums_of(window: Tensor) -> Iterator[NDArray[np.float64]]:
    flat = window.reshape(-1).cpu().numpy()
    for first, end in chunk_runs(tuple(window.shape)):
        yield flat[first:end]


def _sums_of_rows(
    shape: tuple[int, ...], squares: Squares | RowSquares | None, base: Path | None
) -> Iterator[NDArray[np.float64]]:
    """Yield the sums of an embedding chunk by chunk: zeros, or the sums in a file, plus the sums added to rows."""
    width = shape[-1] if shape else 1
    for first, end in chunk_runs(shape):
        if base is None:
            sums = np.zeros(end - first)
        else:
            sums = np.fromfile(base, np.float64, end - first, offset=8 * first)
        for row in range(first // width, -(-end // width)):
            added = None if squares is None else squares.row(row)
            if added is not None:
                low, high = max(first, row * width), min(end, (row + 1) * width)
                sums[low - first : high - first] += (
                    added[low - row * width : high - row * width].cpu().numpy()
                )
        yield sums
