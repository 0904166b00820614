"""Estimates the Fisher diagonal of a model that does not fit in memory, layer by layer, into a store.

Each weight is read twice, however many examples there are: once as all examples pass forward through its layer, once
as their gradients pass backward. Held are one layer, the sums of its squares in fp64, and one example's activations.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streammerge.backends.cpu.before_use import compile_groups
from streammerge.checkpoint.index import TensorIndex, open_model
from streammerge.dtypes import FLOATS
from streammerge.errors import WorldError, printable
from streammerge.estimate.fisher.estimator import AFTER, BEFORE, Estimate, Estimator, Place
from streammerge.estimate.fisher.labels import choose, n_scores
from streammerge.estimate.fisher.squares import RowSquares, Squares
from streammerge.estimate.fisher.sums import DiagonalSums
from streammerge.estimate.network.examples import Example, digest, read_examples, too_few
from streammerge.estimate.network.loader import Loader
from streammerge.estimate.network.progress import Progress
from streammerge.estimate.network.run import Network
from streammerge.estimate.network.sizing import (
    StageSize,
    boundary_elements,
    check_fits,
    head_activations,
    layer_activations,
)
from streammerge.estimate.network.skeleton import CAUSAL, CLASSIFIER, Skeleton
from streammerge.estimate.network.tokenizing import reading_for
from streammerge.events import Control
from streammerge.formats.zarr_store import ATTRIBUTE
from streammerge.formats.zarr_writer import StoreWriter, chunk_runs, locked_partial
from streammerge.io.durable import PARTIAL, make_directory, world_errors
from streammerge.io.reader import Reader
from streammerge.io.stamp import check_unchanged
from streammerge.numerics.casts import to_store
from streammerge.tensors.fingerprint import files_digest, fingerprint
from streammerge.units import format_size
from streammerge.version import __version__

WORK = "__work__"
"""In the unfinished store; no array has such a name."""


@dataclass(frozen=True)
class Settings:
    """Settings of an estimate."""

    labels: str | None = None
    """``sampled``, ``empirical`` or ``exact``, see `fisher.labels`; None: exact for a classifier, else sampled."""
    examples: int | None = None
    """Number of examples, from the first; None: all."""
    max_length: int = 512
    """Tokens after which an example is cut."""
    batch_size: int = 16
    """Examples that are read and written at a time; the values do not depend on it."""
    memory: int | None = None
    """Bound of the peak resident memory in bytes; None: half of what is free."""
    device: str = "cpu"
    seed: int = 0
    """Seed of the drawn labels."""
    dtype: str = "F32"
    """Dtype of the stored values: F32 or BF16. All arithmetic is fp32, all sums fp64."""


@dataclass(frozen=True)
class Computed:
    """The result of an estimate."""

    out: str
    tensors: int
    bytes_read: int
    """In this run."""
    seconds: float
    about: Mapping[str, Any]


def compute_diagonal(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: Path,
    settings: Settings = Settings(),
    *,
    overwrite: bool = False,
    control: Control | None = None,
) -> Computed:
    """Estimate the diagonal of `model` over examples into a store; run again, it continues.

    Parameters
    ----------
    data
        A file of JSON lines, see `network.examples`.

    Raises
    ------
    StreammergeError
        See `streammerge.errors`; stages that are done stay for the next run.
    """
    control, began = control or Control(), time.monotonic()
    index = open_model(model)
    skeleton = Skeleton(index)
    labels = choose(settings.labels, skeleton.kind)
    taken = _read(os.fspath(data), skeleton, index, settings, labels, control)
    estimate = Estimate(taken, labels, settings.seed)
    compile_groups(("adapters", "diagonals"), control)
    reader = Reader()
    try:
        loader = Loader(skeleton, index, reader)
        network = Network(skeleton, torch.device(settings.device))
        scores = n_scores(labels, skeleton.kind, skeleton.n_labels)
        width = network.call(0, taken[-1]).hidden.numel() // taken[-1].length
        check_fits(
            settings.memory,
            list(_stages(skeleton, taken, width)),
            boundary_elements(settings.batch_size, taken[-1].length, width, scores),
        )
        identity = _identity(index, reader, settings, taken, labels)
        with locked_partial(out, overwrite):
            store = StoreWriter(out, identity, attribute=ATTRIBUTE, sums=DiagonalSums)
            work = out.with_name(out.name + PARTIAL) / WORK
            if not work.exists():
                _check_disk(work, network.n_blocks, sum(e.length for e in taken) * width, scores, index)
            progress = Progress(reader, len(index), control)
            results = _Results(store, loader, len(taken), settings.dtype, progress)
            place = Place(work, settings.batch_size, torch.device(settings.device))
            estimator = Estimator(network, loader, estimate, place, results.write, progress.tick)
            progress.total = estimator.total_work
            names = {name for parameter in skeleton.aliases for name in loader.parts(parameter, parameter)}
            order = [name for name in index if name in names]
            known = [
                store.known(name) for name in order
            ]  # asked of every tensor: the store takes up its entry
            if not all(known):  # else it was stopped just before the store had its name
                estimator.run()
            for stamp in index.stamps:
                check_unchanged(stamp)
            missing = [name for name, ref in index.items() if name not in names and ref.dtype in FLOATS]
            if missing:
                control.warn(
                    f"{len(missing)} tensors of {printable(index.reference)} are no parameters of "
                    f"{type(skeleton.model).__name__} (first: {printable(missing[0])}); they get no diagonal"
                )
            with world_errors(work):
                shutil.rmtree(work, ignore_errors=True)
            about = _about(os.path.basename(os.path.normpath(model)), skeleton, settings, taken, identity)
            attributes = store.commit(order, {**about, "missing": missing})
    finally:
        reader.close()
    return Computed(str(out), len(order), reader.bytes_read, time.monotonic() - began, attributes)


def _read(
    data: str, skeleton: Skeleton, index: TensorIndex, settings: Settings, labels: str, control: Control
) -> list[Example]:
    """Read the examples; warn where there are fewer than were asked for."""
    with_labels = skeleton.kind == CLASSIFIER and labels == "empirical"
    reading = reading_for(skeleton, index, settings.max_length, with_labels=with_labels)
    taken = read_examples(data, settings.examples, reading)
    if (few := too_few(data, settings.examples, len(taken))) is not None:
        control.warn(few)
    return taken


def _identity(
    index: TensorIndex, reader: Reader, settings: Settings, taken: list[Example], labels: str
) -> dict[str, str]:
    """Return the names and values that a run must share with the one that it continues."""
    return {
        "version": __version__,
        "model": fingerprint(index, reader),
        "files": files_digest(index.stamps),
        "dtype": settings.dtype,
        "examples": digest(taken),
        "labels": labels,
        "seed": str(settings.seed),
    }


def _about(
    name: str, skeleton: Skeleton, settings: Settings, taken: list[Example], identity: Mapping[str, str]
) -> dict[str, Any]:
    """Return the store's record of the estimate."""
    return {
        "model_fingerprint": identity["model"],
        "model_name": name,
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
    """Refuse what the disk has no room for: hidden states between all layers, two sets of gradients, the store."""
    make_directory(work.parent)
    needed = 4 * (elements * (n_blocks + 1 + 2 * scores) + sum(ref.n_elements for ref in index.values()))
    free = shutil.disk_usage(work.parent).free
    if needed > free:
        raise WorldError(
            f"{printable(work.parent)}: the hidden states between the layers and the store need {format_size(needed)}, "
            f"{format_size(free)} are free: free some space, or take fewer or shorter examples"
        )


class _Results:
    """Writes means of squares under the names that the checkpoint has for them."""

    def __init__(self, store: StoreWriter, loader: Loader, n: int, dtype: str, progress: Progress) -> None:
        self._store = store
        self._loader = loader
        self._n = n
        self._dtype = dtype
        self._progress = progress

    def write(self, parameter: nn.Parameter, squares: Squares | RowSquares | None, base: Path | None) -> None:
        """Write the diagonal of a parameter, as far as an earlier run has not."""
        dense = squares.sums if isinstance(squares, Squares) else None
        for name, window in self._loader.parts(parameter, parameter if dense is None else dense).items():
            if not self._store.known(name):
                shape = tuple(window.shape)
                sums = (
                    _sums_of_rows(shape, squares, base)
                    if not isinstance(squares, Squares)
                    else _sums_of(window)
                )
                self._store.write(name, shape, self._dtype, (self._mean(some) for some in sums))
            self._progress.wrote(window.numel() * (2 if self._dtype == "BF16" else 4))

    def _mean(self, sums: NDArray[np.float64]) -> NDArray[Any]:
        return to_store((sums / self._n).astype(np.float32), "F32", self._dtype)


def _sums_of(window: Tensor) -> Iterator[NDArray[np.float64]]:
    flat = window.reshape(-1).cpu().numpy()
    for first, end in chunk_runs(tuple(window.shape)):
        yield flat[first:end]


def _sums_of_rows(
    shape: tuple[int, ...], squares: RowSquares | None, base: Path | None
) -> Iterator[NDArray[np.float64]]:
    """Yield the sums of an embedding chunk by chunk: zeros, or those in a file, and what was added to rows."""
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
