"""What runs a model over examples: Fisher diagonals and Gram matrices."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.api.devices import WORTH_A_GPU, choose_device, nbytes_of
from streammerge.dtypes import NAMES
from streammerge.engine.session import Event
from streammerge.errors import InputError, printable

if TYPE_CHECKING:  # they import torch
    from streammerge.fisher.compute import Computed
    from streammerge.gram.compute import Collected


def compute_fisher(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    labels: str | None = None,
    examples: int | None = None,
    max_length: int = 512,
    batch_size: int = 16,
    memory: str | int | None = None,
    device: str = "cpu",
    seed: int = 0,
    dtype: str = "float32",
    overwrite: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    stop: threading.Event | None = None,
    signal_received: Callable[[], int | None] = lambda: None,
) -> Computed:
    """Estimate the Fisher diagonal of a model that need not fit in memory; run again, it continues.

    Parameters
    ----------
    model
        A causal language model or a sequence classifier that transformers can build.
    data
        A file of JSON lines: ``text`` or ``input_ids``, and ``label`` where a classifier's own are asked for.
    out
        The store to write.
    labels
        ``sampled``, ``empirical`` or ``exact``; default: exact for a classifier, sampled for a language model.
    examples
        How many are taken, from the first; default: all.
    max_length
        Tokens after which an example is cut.
    batch_size
        Examples that are read and written at a time; the values do not depend on it.
    memory
        Bound of the process's peak resident memory, ``"2GiB"`` or bytes; default: half of what is free.
    device
        ``cpu`` or ``cuda[:N]``.
    seed
        Of the drawn labels.
    dtype
        Of the stored values: ``float32`` or ``bfloat16``.
    overwrite
        Replace `out`, or what an unfinished run left.
    on_event
        Called from the calling thread with progress.

    Raises
    ------
    StreammergeError
        See `streammerge.errors`.
    """
    from streammerge.fisher.compute import Settings, compute_diagonal

    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype {printable(dtype)!r} is none of float32, bfloat16")
    chosen = "cpu" if device == "cpu" else choose_device(device, nbytes_of(memory), WORTH_A_GPU)
    settings = Settings(
        labels, examples, max_length, batch_size, nbytes_of(memory), chosen, seed, NAMES[dtype]
    )
    return compute_diagonal(
        model,
        data,
        Path(out),
        settings,
        overwrite=overwrite,
        emit=on_event,
        stop=stop,
        signal_received=signal_received,
    )


def compute_grams(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    examples: int | None = None,
    max_length: int = 512,
    batch_size: int = 16,
    memory: str | int | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    stop: threading.Event | None = None,
    signal_received: Callable[[], int | None] = lambda: None,
) -> Collected:
    """Collect the Gram matrices of the linear maps in a model's layers, for `regmean`; run again, it continues.

    The parameters are those of `compute_fisher`.

    Raises
    ------
    StreammergeError
        See `streammerge.errors`.
    """
    from streammerge.gram.compute import Settings
    from streammerge.gram.compute import compute_grams as run

    chosen = "cpu" if device == "cpu" else choose_device(device, nbytes_of(memory), WORTH_A_GPU)
    settings = Settings(examples, max_length, batch_size, nbytes_of(memory), chosen)
    return run(
        model,
        data,
        Path(out),
        settings,
        overwrite=overwrite,
        emit=on_event,
        stop=stop,
        signal_received=signal_received,
    )
