"""`extract_lora`: the difference of two models as an adapter."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from streammerge.api.feedback import OnEvent
from streammerge.api.merging import merge
from streammerge.config.lora import extraction
from streammerge.engine.merge import Summary
from streammerge.io.reader import IoMode


def extract_lora(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    include: str | None = None,
    exclude: str | None = None,
    embeddings: bool = False,
    modules_to_save: Sequence[str] = (),
    drop_rest: bool = False,
    dtype: str | None = None,
    memory: str | int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    hash_inputs: bool = False,
    io: IoMode = "direct",
    progress: bool = True,
    on_event: OnEvent | None = None,
    stop: threading.Event | None = None,
) -> Summary:
    """Write a model minus its base as a LoRA adapter that PEFT loads; after an interruption, the same call resumes.

    Parameters
    ----------
    model, base
        The fine-tuned model, and the one that it was tuned from.
    out
        The directory to write.
    rank
        Rank of every module; default: 32.
    energy
        Instead of `rank`: the least rank of each module that has this share of the squared norm of its change.
    max_rank
        The most that `energy` may choose; default: 256.
    include, exclude
        Regular expressions: only, or no, modules whose names they find.
    embeddings
        Decompose embeddings and heads too; otherwise they are stored whole.
    modules_to_save
        Names, or ends of names, of modules that are stored whole.
    drop_rest
        Leave out everything that is not decomposed.
    dtype
        Dtype of the adapter; default: float32 for the factors, the model's for whole tensors.
    memory, threads, overwrite, hash_inputs, io, progress, on_event, stop
        As in `merge`.

    Returns
    -------
    Summary
        Its `residuals` have the part of each module's change that the factors miss.

    Raises
    ------
    StreammergeError
        As `merge` does; also if no matrix differs.

    Examples
    --------
    >>> summary = streammerge.extract_lora("tuned", "adapter", base="base", rank=64)  # doctest: +SKIP
    >>> max(one.residual for one in summary.residuals)  # doctest: +SKIP
    0.41
    """
    config = extraction(
        os.fspath(model),
        os.fspath(base),
        rank=rank,
        energy=energy,
        dtype=dtype,
        max_rank=max_rank,
        include=include,
        exclude=exclude,
        embeddings=embeddings,
        modules_to_save=list(modules_to_save),
        drop_rest=drop_rest,
    )
    return merge(
        config,
        out,
        memory=memory,
        threads=threads,
        overwrite=overwrite,
        hash_inputs=hash_inputs,
        io=io,
        progress=progress,
        on_event=on_event,
        stop=stop,
    )
