"""Estimates the Fisher diagonal of a model that does not fit in memory, layer by layer, into a store.

Each weight is read twice, however many examples there are: once as all examples pass forward through its layer, once
as their gradients pass backward. Held are one layer, the sums of its squares in fp64, and one example's activations.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streammerge import __version__
from streammerge.dtypes import FLOATS
from streammerge.engine.durable import world_errors
from streammerge.engine.fingerprint import files_digest, fingerprint
from streammerge.engine.reader import Reader, check_unchanged
from streammerge.engine.session import Event
from streammerge.engine.warm import ensure_compiled
from streammerge.errors import InputError, Stopped, printable
from streammerge.fisher.estimator import Estimate, Estimator, Place
from streammerge.fisher.labels import choose
from streammerge.fisher.squares import RowSquares, Squares
from streammerge.fisher.store import StoreWriter, chunk_runs, locked_partial, to_store
from streammerge.index.model import TensorIndex, open_model
from streammerge.network.examples import Reading, Tokenize, digest, read_examples
from streammerge.network.loader import Loader
from streammerge.network.run import Network
from streammerge.network.skeleton import CAUSAL, CLASSIFIER, Skeleton

WORK = "__work__"
"""In the unfinished store; no array has such a name."""

_EVENT_SECONDS = 0.2


@dataclass(frozen=True)
class Settings:
    """How a diagonal is estimated."""

    labels: str | None = None
    """``sampled``, ``empirical`` or ``exact``, see `fisher.labels`; None: exact for a classifier, else sampled."""
    examples: int | None = None
    """How many are taken, from the first; None: all."""
    max_length: int = 512
    """Tokens after which an example is cut."""
    batch_size: int = 16
    """Examples that are read and written at a time; the values do not depend on it."""
    memory: int | None = None
    """Bound of the peak resident memory in bytes; None: half of what is free."""
    device: str = "cpu"
    seed: int = 0
    """Of the drawn labels."""
    dtype: str = "F32"
    """Of the stored values: F32 or BF16. All arithmetic is fp32, all sums fp64."""


@dataclass(frozen=True)
class Computed:
    """What an estimate did."""

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
    settings: Settings = Settings(),  # noqa: B008  (frozen)
    *,
    overwrite: bool = False,
    emit: Callable[[Event], None] = lambda event: None,
    stop: threading.Event | None = None,
    signal_received: Callable[[], int | None] = lambda: None,
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
    began = time.monotonic()
    index = open_model(model)
    skeleton = Skeleton(index)
    labels = choose(settings.labels, skeleton.kind)
    taken = read_examples(
        os.fspath(data), settings.examples, _reading(skeleton, index, labels, settings.max_length)
    )
    estimate = Estimate(taken, labels, settings.seed)
    ensure_compiled()
    device = torch.device(settings.device)
    stop = stop or threading.Event()
    reader = Reader()
    try:
        loader = Loader(skeleton, index, reader)
        network = Network(skeleton, device)
        identity = {
            "version": __version__, "model": fingerprint(index, reader), "files": files_digest(index.stamps),
            "dtype": settings.dtype, "examples": digest(taken), "labels": labels, "seed": str(settings.seed),
        }  # fmt: skip
        with locked_partial(out, overwrite):
            store = StoreWriter(out, identity)
            work = out.with_name(out.name + ".partial") / WORK
            progress = _Progress(reader, len(index), emit, stop, signal_received)
            results = _Results(store, loader, len(taken), settings.dtype, progress)
            estimator = Estimator(
                network, loader, estimate, Place(work, settings.batch_size, device), results.write, progress.tick
            )
            progress.total = estimator.total_work
            estimator.run()
            for stamp in index.stamps:
                check_unchanged(stamp)
            order = [name for name in index if name in results.names]
            missing = [name for name, ref in index.items() if name not in results.names and ref.dtype in FLOATS]
            with world_errors(work):
                shutil.rmtree(work)
            attributes = store.commit(order, {
                "model_fingerprint": identity["model"], "model_name": os.path.basename(os.path.normpath(model)),
                "estimator": labels, "kind": skeleton.kind, "examples": len(taken), "seed": settings.seed,
                "tokens": sum(example.length for example in taken), "max_length": settings.max_length,
                "data": identity["examples"], "dtype": settings.dtype, "missing": missing,
            })  # fmt: skip
    finally:
        reader.close()
    return Computed(str(out), len(order), reader.bytes_read, time.monotonic() - began, attributes)


def _reading(skeleton: Skeleton, index: TensorIndex, labels: str, max_length: int) -> Reading:
    wants_labels = skeleton.kind == CLASSIFIER and labels == "empirical"
    longest = min(max_length, skeleton.positions or max_length)
    return Reading(
        max_length=longest, min_length=2 if skeleton.kind == CAUSAL else 1, vocabulary=skeleton.vocabulary,
        tokenize=lambda: _tokenizer(index, longest), labels=skeleton.label_numbers if wants_labels else None,
    )  # fmt: skip


def _tokenizer(index: TensorIndex, max_length: int) -> Tokenize:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(index.directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the library makes of the files
        raise InputError(
            f"{printable(index.reference)}: no tokenizer could be loaded for text: "
            f"{printable(str(error).strip() or type(error).__name__, 300)}; give input_ids instead"
        ) from error

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        return ids

    return tokenize


class _Progress:
    """Counts the work, tells of it, and stops it when asked to."""

    def __init__(
        self, reader: Reader, n_tensors: int, emit: Callable[[Event], None], stop: threading.Event,
        signal_received: Callable[[], int | None],
    ) -> None:  # fmt: skip
        self._reader = reader
        self._emit = emit
        self._stop = stop
        self._signal = signal_received
        self._values = {"tensors": 0, "tensors_total": n_tensors, "bytes_written": 0}
        self._next = 0.0
        self.done = 0
        self.total = 0

    def tick(self, work: int) -> None:
        """Count work; raise if the estimate is to stop."""
        if self._stop.is_set():
            raise Stopped(self._signal() or 15)
        self.done += work
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _EVENT_SECONDS
        self._emit(Event("progress", {
            **self._values, "elements": self.done, "elements_total": self.total, "bytes_read": self._reader.bytes_read,
        }))  # fmt: skip

    def wrote(self, nbytes: int) -> None:
        """Count a tensor of the store."""
        self._values["tensors"] += 1
        self._values["bytes_written"] += nbytes


class _Results:
    """Writes means of squares under the names that the checkpoint has for them.

    Attributes
    ----------
    names
        Tensors that have a diagonal.
    """

    def __init__(self, store: StoreWriter, loader: Loader, n: int, dtype: str, progress: _Progress) -> None:
        self._store = store
        self._loader = loader
        self._n = n
        self._dtype = dtype
        self._progress = progress
        self.names: set[str] = set()

    def write(self, parameter: nn.Parameter, squares: Squares | RowSquares | None, base: Path | None) -> None:
        """Write the diagonal of a parameter, as far as an earlier run has not."""
        dense = squares.sums if isinstance(squares, Squares) else None
        for name, window in self._loader.parts(parameter, parameter if dense is None else dense).items():
            self.names.add(name)
            if not self._store.known(name):
                shape = tuple(window.shape)
                sums = _sums_of_rows(shape, squares, base) if not isinstance(squares, Squares) else _sums_of(window)
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
        for row in range(first // width, -(-end // width)) if squares is not None else ():
            added = squares.row(row)
            if added is not None:
                low, high = max(first, row * width), min(end, (row + 1) * width)
                sums[low - first : high - first] += added[low - row * width : high - row * width].cpu().numpy()
        yield sums
