"""Write a store of Fisher diagonals: a Zarr 3 group with one array per tensor, named after the tensor.

The store is written array by array to a directory next to the final one. An array is complete when its attributes have
its table entry, which is written only after its chunks are durable. The store is complete when the group's table is
written and the directory has its final name. Arrays that an interrupted run has completed are kept.

::

    OUT.partial/zarr.json                  the group; finally with the table of all arrays
    OUT.partial/<tensor>/zarr.json         an array; finally with its table entry
    OUT.partial/<tensor>/c/0/0 ...         chunks: runs of elements, Blosc, CRC-32C
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from streammerge.dtypes import itemsize
from streammerge.errors import OutputError, printable
from streammerge.formats.zarr_chunks import cut_axis
from streammerge.formats.zarr_store import FORMAT, GROUP_FILE, STORED
from streammerge.io.durable import PARTIAL, fsync_directory, world_errors, write_file
from streammerge.io.lock import locked_directory
from streammerge.numerics.ordered_sum import BLOCK

CHUNK_ELEMENTS = 1 << 20
_ALIGN = BLOCK
"""Chunks are multiples of this number of elements if rows allow it, so that block statistics need no second pass."""
_BINDING = "import.json"


class Sums(Protocol):
    """Collects the recorded values of an array from runs of its elements."""

    def add(self, values: NDArray[Any]) -> None:
        """Add a run of elements; refuse values that may not be stored."""

    def values(self) -> dict[str, Any]:
        """Return the recorded values after all runs were added."""


def chunk_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a chunk of about `CHUNK_ELEMENTS` elements that are contiguous in the tensor.

    >>> chunk_shape((32000, 2048)), chunk_shape((64,)), chunk_shape(())
    ((512, 2048), (64,), ())
    """
    rest = 1
    for axis in range(len(shape) - 1, -1, -1):
        if rest * shape[axis] > CHUNK_ELEMENTS:
            rows = max(1, CHUNK_ELEMENTS // rest)
            step = _ALIGN // math.gcd(_ALIGN, rest)
            rows = rows // step * step if rows >= step else rows
            return (*(1 for _ in shape[:axis]), rows, *shape[axis + 1 :])
        rest *= shape[axis]
    return tuple(max(1, size) for size in shape)


def array_name(tensor: str) -> str:
    """Return the name of a tensor's array: the tensor's name, or an escaped form if it cannot name a directory.

    >>> array_name("model.layers.0.mlp.up_proj.weight"), array_name("a/b")
    ('model.layers.0.mlp.up_proj.weight', '%a%2Fb')
    """
    plain = tensor.isprintable() and "/" not in tensor and "\\" not in tensor and tensor.strip(".")
    if plain and not tensor.startswith(("__", "%")) and len(tensor.encode()) <= 200 and tensor != GROUP_FILE:
        return tensor
    escaped = "%" + "".join(
        c if (c.isalnum() and c.isascii()) or c in "._-" else f"%{ord(c):02X}" for c in tensor
    )
    if len(escaped) <= 200:
        return escaped
    return "%%" + hashlib.blake2b(tensor.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class StoreWriter:
    """One locked, unfinished store.

    Parameters
    ----------
    out
        The store's final directory; it must not exist.
    binding
        The inputs that determine the content; an interrupted store is continued only with the same inputs.
    attribute
        The attribute that holds the table; it identifies the kind of store.
    sums
        Function that returns the `Sums` of an array, from tensor and dtype.
    """

    def __init__(
        self,
        out: Path,
        binding: Mapping[str, str],
        *,
        attribute: str,
        sums: Callable[[str, str], Sums],
    ) -> None:
        import zarr

        self._attribute = attribute
        self._sums = sums

        self._out = out
        self._partial = out.with_name(out.name + PARTIAL)
        self._entries: dict[str, dict[str, Any]] = {}
        with world_errors(self._partial):
            recorded = self._partial / _BINDING
            text = json.dumps(dict(binding), sort_keys=True).encode()
            if not recorded.exists():
                write_file(recorded, text)
            elif recorded.read_bytes() != text:
                raise OutputError(
                    f"{printable(self._partial)}: holds an unfinished store of something else; run it with what it "
                    "began with, or start over with --overwrite"
                )
            for left in self._partial.glob("*.partial"):  # files that Zarr was writing when it was killed
                left.unlink()
            self._group = zarr.open_group(str(self._partial), mode="a", zarr_format=3)

    def known(self, tensor: str) -> bool:
        """Return whether an earlier run has completed a tensor's array; remove an incomplete one."""
        directory = self._partial / array_name(tensor)
        if not directory.exists():
            return False
        entry = _entry_of(directory, self._attribute)
        if entry is not None and entry.get("stored_nbytes") == _chunk_bytes(directory):
            self._entries[tensor] = entry
            return True
        shutil.rmtree(directory)
        return False

    def write(self, tensor: str, shape: tuple[int, ...], dtype: str, runs: Iterable[NDArray[Any]]) -> None:
        """Write one array from runs of elements, one per chunk, in order; the array is durable on return.

        Parameters
        ----------
        dtype
            Format code of the store: F32, or BF16 as uint16 patterns.
        """
        from zarr.codecs import BloscCodec, Crc32cCodec

        name, chunk = array_name(tensor), chunk_shape(shape)
        with world_errors(self._partial / name):
            array = self._group.create_array(
                name,
                shape=shape,
                chunks=chunk,
                dtype=STORED[dtype],
                fill_value=0,
                compressors=[
                    BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=itemsize(dtype)),
                    Crc32cCodec(),
                ],
                config={"write_empty_chunks": True},
            )
            sums = self._sums(tensor, dtype)
            for place, values in zip(_places(shape, chunk), runs, strict=True):
                sums.add(values)
                array[place] = values.reshape(_extent(place))
            _sync_tree(self._partial / name)
            entry = {
                "array": name,
                "dtype": dtype,
                "shape": list(shape),
                "chunk": list(chunk),
                **sums.values(),
                "stored_nbytes": _chunk_bytes(self._partial / name),
            }
            array.attrs.update({self._attribute: {"tensor": tensor, **entry}})
            _sync_tree(self._partial / name, chunks=False)
            fsync_directory(self._partial)
        self._entries[tensor] = entry

    def commit(self, order: Iterable[str], about: Mapping[str, Any]) -> dict[str, Any]:
        """Write the table of all arrays and rename the store to its final name; return the attributes."""
        table = {tensor: self._entries[tensor] for tensor in order}
        squares = np.cumsum([entry["square_sum"] for entry in table.values()])[-1]
        attributes = {
            "format": FORMAT,
            **about,
            "elements": sum(math.prod(entry["shape"]) for entry in table.values()),
            "sum": float(np.cumsum([entry["sum"] for entry in table.values()])[-1]),
            "norm": math.sqrt(squares),
            "tensors": table,
        }
        with world_errors(self._out):
            self._group.attrs.update({self._attribute: attributes})
            (self._partial / _BINDING).unlink(missing_ok=True)
            _sync_tree(self._partial, chunks=False)
            os.rename(self._partial, self._out)
            fsync_directory(self._out.parent)
        return attributes


@contextmanager
def locked_partial(out: Path, overwrite: bool) -> Iterator[None]:
    """Hold the lock of an unfinished store; with `overwrite` first remove an existing store.

    Raises
    ------
    OutputError
        If `out` exists and may not be replaced, or another process writes it.
    """
    partial = out.with_name(out.name + PARTIAL)
    if out.exists() and not overwrite:
        raise OutputError(
            f"{printable(out)}: exists already; choose another name, or replace it with --overwrite"
        )
    if out.exists() and not (out / GROUP_FILE).exists():
        raise OutputError(f"{printable(out)}: is no Zarr store; it is not replaced, choose another name")
    with world_errors(partial):
        partial.mkdir(parents=True, exist_ok=True)
    with locked_directory(partial, f"{printable(out)}: another process is writing it"):
        if overwrite:
            with world_errors(out):
                for entry in partial.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                if out.exists():
                    shutil.rmtree(out)
        yield


def _places(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yield the slices of every chunk, in the order of the elements."""
    if not shape:
        yield ()
        return
    axis = cut_axis(shape, chunk)
    for row in range(math.prod(shape[:axis])) if math.prod(shape) else ():
        index = np.unravel_index(row, shape[:axis]) if axis else ()
        for first in range(0, shape[axis], chunk[axis]):
            cut = slice(first, min(shape[axis], first + chunk[axis]))
            yield (
                *(slice(int(i), int(i) + 1) for i in index),
                cut,
                *(slice(0, n) for n in shape[axis + 1 :]),
            )


def _extent(place: tuple[slice, ...]) -> tuple[int, ...]:
    return tuple(cut.stop - cut.start for cut in place)


def chunk_runs(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the range of elements (first, end) of each chunk of a tensor, in order."""
    start = 0
    for place in _places(shape, chunk_shape(shape)):
        n = math.prod(_extent(place))
        yield start, start + n
        start += n


def _entry_of(directory: Path, attribute: str) -> dict[str, Any] | None:
    """Return the table entry in a complete array's attributes; None if it is incomplete."""
    try:
        entry = json.loads((directory / GROUP_FILE).read_bytes())["attributes"][attribute]
        return {key: value for key, value in entry.items() if key != "tensor"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _chunk_bytes(directory: Path) -> int:
    """Return the bytes of all files of an array except its description."""
    return sum(
        os.path.getsize(os.path.join(folder, file))
        for folder, _, files in os.walk(directory)
        for file in files
        if file != GROUP_FILE
    )


def _sync_tree(directory: Path, *, chunks: bool = True) -> None:
    """Make the files of a directory durable: all below it, or only those directly in it."""
    for folder, _, files in os.walk(directory):
        for file in files:
            descriptor = os.open(os.path.join(folder, file), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(Path(folder))
        if not chunks:
            break
