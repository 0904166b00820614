"""Run a model over examples to estimate Fisher diagonals or Gram matrices."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from streammerge.api.feedback import OnEvent, controlled
from streammerge.dtypes import NAMES
from streammerge.errors import InputError, printable
from streammerge.io.volumes import local_path
from streammerge.planning.backend import choose_device
from streammerge.units import nbytes_of

if TYPE_CHECKING:
    from streammerge.estimate.store_run import Written


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
    progress: bool = True,
    on_event: OnEvent | None = None,
    stop: threading.Event | None = None,
    signal_received: Callable[[], int | None] = lambda: None,
) -> Written:
    """Estimate the Fisher diagonal of a model that need not fit in memory; running it again resumes.

    Parameters
    ----------
    model
        A causal language model or a sequence classifier that transformers can build.
    data
        A file of JSON lines: ``text`` or ``input_ids``, and ``label`` for empirical labels of a classifier.
    out
        The store to write.
    labels
        ``sampled``, ``empirical`` or ``exact``; default: exact for a classifier, sampled for a language model.
    examples
        Number of examples to use, from the first; default: all.
    max_length
        Examples are truncated to this number of tokens.
    batch_size
        Number of examples that are read and written at a time; values do not depend on it.
    memory
        Bound of the process's peak resident memory, ``"2GiB"`` or bytes; default: half of what is free.
    device
        ``cpu`` or ``cuda[:N]``.
    seed
        Seed for drawing labels.
    dtype
        Of the stored values: ``float32`` or ``bfloat16``.
    overwrite
        Replace `out`, or what an unfinished run left.
    progress
        Whether to show a bar (on terminals and in notebooks) or, elsewhere, lines on stderr.
    on_event
        Receives every event, warnings included, in the calling thread, instead of the bar and Python's warnings.
    stop
        Set it, from a different thread, to stop cleanly.
    signal_received
        Returns the number of the signal that set `stop`.

    Returns
    -------
    Written
        Tensors, bytes read, seconds, and the store's own record.

    Raises
    ------
    InputError
        If the model, the data or the memory does not allow it.
    WorldError
        If the disk is full, or the machine fails otherwise; the same call resumes.
    Stopped
        If `stop` was set; the same call resumes.

    Examples
    --------
    >>> streammerge.compute_fisher("models/math", "examples.jsonl", "math.zarr", examples=512)  # doctest: +SKIP
    """
    from streammerge.estimate.fisher.compute import Settings, compute_diagonal

    _check_dtype(dtype)
    settings = Settings(
        labels=labels,
        examples=examples,
        max_length=max_length,
        batch_size=batch_size,
        memory=nbytes_of(memory),
        device=choose_device(device, nbytes_of(memory)),
        seed=seed,
        dtype=NAMES[dtype],
    )
    with controlled(on_event, progress, "estimating", stop, signal_received) as control:
        return compute_diagonal(
            model, data, local_path(out, "a store"), settings, overwrite=overwrite, control=control
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
    progress: bool = True,
    on_event: OnEvent | None = None,
    stop: threading.Event | None = None,
    signal_received: Callable[[], int | None] = lambda: None,
) -> Written:
    """Collect the Gram matrices of the linear maps in a model's layers, for `regmean`; running it again resumes.

    Parameters
    ----------
    model
        A causal language model or a sequence classifier that transformers can build.
    data
        A file of JSON lines: ``text`` or ``input_ids``.
    out
        The store to write.
    examples, max_length, batch_size, memory, device, overwrite, progress, on_event, stop, signal_received
        As for `compute_fisher`.

    Returns
    -------
    Written
        Tensors, bytes read, seconds, and the store's own record.

    Raises
    ------
    StreammergeError
        As for `compute_fisher`.

    Examples
    --------
    >>> streammerge.compute_grams("models/math", "examples.jsonl", "math-gram.zarr")  # doctest: +SKIP
    """
    from streammerge.estimate.gram.compute import compute_grams as run
    from streammerge.estimate.network.settings import StreamSettings

    settings = StreamSettings(
        examples=examples,
        max_length=max_length,
        batch_size=batch_size,
        memory=nbytes_of(memory),
        device=choose_device(device, nbytes_of(memory)),
    )
    with controlled(on_event, progress, "collecting", stop, signal_received) as control:
        return run(model, data, local_path(out, "a store"), settings, overwrite=overwrite, control=control)


def import_fisher(
    model: str | os.PathLike[str],
    diagonals: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    memory: str | int | None = None,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    on_event: OnEvent | None = None,
    stop: threading.Event | None = None,
    signal_received: Callable[[], int | None] = lambda: None,
) -> Written:
    """Stream existing Fisher diagonals into a store; running it again resumes.

    Parameters
    ----------
    model
        The model that they belong to. Names and shapes must agree, and the store is bound to the model's content.
    diagonals
        A safetensors file or directory, or a PyTorch file of a flat dict of tensors.
    out
        The store to write.
    dtype
        Of the stored values: ``float32`` or ``bfloat16``.
    memory
        Bound of the process's peak resident memory, ``"2GiB"`` or bytes; default: half of what is free.
    about
        Facts about the estimate to record: ``estimator``, ``examples``, ``seed``.
    overwrite
        Replace `out`, or what an unfinished import left.
    progress, on_event, stop, signal_received
        As for `compute_fisher`.

    Returns
    -------
    Written
        Tensors, those of an earlier run, and the store's own record.

    Raises
    ------
    StreammergeError
        As for `compute_fisher`.

    Examples
    --------
    >>> streammerge.import_fisher("models/math", "diagonal.safetensors", "math.zarr")  # doctest: +SKIP
    """
    from streammerge.estimate.fisher.importing import import_diagonal

    _check_dtype(dtype)
    with controlled(on_event, progress, "importing", stop, signal_received) as control:
        return import_diagonal(
            model,
            diagonals,
            local_path(out, "a store"),
            dtype=NAMES[dtype],
            memory=nbytes_of(memory),
            about=about,
            overwrite=overwrite,
            control=control,
        )


def _check_dtype(dtype: str) -> None:
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype {printable(dtype)!r} is not one of float32, bfloat16")
