"""Import an existing diagonal from a safetensors or PyTorch file, streamed into a store."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.backends.cpu.backend import CPU
from streammerge.checkpoint.index import TensorIndex, open_model
from streammerge.dtypes import FLOATS, NUMPY, itemsize
from streammerge.errors import ModelError, printable
from streammerge.estimate.fisher.sums import DiagonalSums
from streammerge.estimate.store_run import StoreRun, Written
from streammerge.events import Control, Event
from streammerge.formats.parts import contiguous
from streammerge.formats.refs import TensorRef
from streammerge.formats.torch_file import PICKLES, read_pickle
from streammerge.formats.zarr_store import ATTRIBUTE
from streammerge.formats.zarr_writer import CHUNK_ELEMENTS, chunk_runs
from streammerge.io.stamp import FileStamp
from streammerge.numerics.casts import to_store
from streammerge.planning.memory.budget import enough_budget
from streammerge.tensors.fingerprint import files_digest

_BUFFERS = 12
"""Number of fp32 chunks held at a time: read, widened, summed, compressed, and Zarr's own copies."""


def import_diagonal(
    model: str | os.PathLike[str],
    source: str | os.PathLike[str],
    out: Path,
    *,
    dtype: str = "F32",
    memory: int | None = None,
    about: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    control: Control | None = None,
) -> Written:
    """Stream the diagonals in `source` into a store for `model`; running it again resumes.

    Parameters
    ----------
    model
        The model that they belong to. Names and shapes must agree, and the store is bound to the model's content.
    source
        A safetensors file or directory, or a PyTorch file of a flat dict of tensors.
    dtype
        F32, or BF16 for half the size; estimates are noisier than its rounding.
    memory
        Bound of the peak resident memory in bytes; default: half of what is free.
    about
        Facts about the estimate to record: ``estimator``, ``examples``, ``seed``.

    Raises
    ------
    StreammergeError
        See `streammerge.errors`; finished arrays are kept for the next run.
    """
    enough_budget(memory, 1, CPU.reserve + _BUFFERS * 4 * CHUNK_ELEMENTS)
    run = StoreRun(model, out, attribute=ATTRIBUTE, sums=DiagonalSums, control=control)
    refs, stamps = _open_source(os.fspath(source))
    _check_against(refs, run.index, os.fspath(source), run.control)
    identity = {
        "dtype": dtype,
        "source": files_digest(stamps),
        "about": repr(sorted((about or {}).items())),
    }
    known = {
        "estimator": None,
        "examples": None,
        "seed": None,
        **(about or {}),
        "dtype": dtype,
        "missing": [n for n, ref in run.index.items() if n not in refs and ref.dtype in FLOATS],
    }
    with run.writing(identity, overwrite):
        resumed = _write_all(run, refs, dtype)
        return run.finish(refs, known, stamps=stamps, resumed=resumed)


def _write_all(run: StoreRun, refs: Mapping[str, TensorRef], dtype: str) -> int:
    """Write the tensors that an earlier run has not written; return the number that it has."""
    resumed = 0
    for done, (name, ref) in enumerate(refs.items()):
        run.control.check()
        if run.store.known(name):
            resumed += 1
        else:
            run.store.write(name, ref.shape, dtype, _runs(run, ref, dtype))
        values = {"tensors": done + 1, "tensors_total": len(refs), "bytes_read": run.reader.bytes_read}
        run.control.emit(Event("import", values))
    return resumed


def _runs(run: StoreRun, ref: TensorRef, dtype: str) -> Iterator[NDArray[Any]]:
    """Yield the elements of each chunk of the store, in its dtype."""
    width = itemsize(ref.dtype)
    for first, end in chunk_runs(ref.shape):
        run.control.check()
        buffer = np.empty((end - first) * width, np.uint8)
        run.reader.read_into(ref.path, ref.offset + first * width, buffer)
        values = buffer.view(NUMPY[ref.dtype])
        yield to_store(values, ref.dtype, dtype)


def _open_source(source: str) -> tuple[Mapping[str, TensorRef], tuple[FileStamp, ...]]:
    if source.endswith(PICKLES):
        refs, stamp = read_pickle(source)
        return {name: contiguous(ref) for name, ref in refs.items()}, (stamp,)
    index = open_model(source)
    return index.stored(), index.stamps


def _check_against(refs: Mapping[str, TensorRef], model: TensorIndex, source: str, control: Control) -> None:
    for name, ref in refs.items():
        if name not in model:
            raise ModelError(
                f"{printable(source)}: tensor {printable(name)} is not in {printable(model.reference)}: a diagonal must use "
                "its model's names"
            )
        if ref.shape != model[name].shape:
            raise ModelError(
                f"{printable(source)}: tensor {printable(name)} has shape {list(ref.shape)}, "
                f"{list(model[name].shape)} in {printable(model.reference)}"
            )
        if ref.dtype not in FLOATS:
            raise ModelError(f"{printable(source)}: tensor {printable(name)} is {ref.dtype}, not a float")
    missing = [name for name, ref in model.items() if name not in refs and ref.dtype in FLOATS]
    if missing:
        control.warn(
            f"{len(missing)} tensors of {printable(model.reference)} have no diagonal "
            f"(first: {printable(missing[0])})"
        )
