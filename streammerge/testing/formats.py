"""`check_format`: the laws of input formats over one file."""

from __future__ import annotations

import os
import pickle
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.index import open_model
from streammerge.dtypes import itemsize
from streammerge.errors import InputError
from streammerge.formats.refs import SourceRef
from streammerge.formats.registry import open_file, suffixes
from streammerge.io.reader import Reader
from streammerge.io.scratch import Scratch

_RANGES = 20


def check_format(path: str | os.PathLike[str], expected: Mapping[str, bytes]) -> None:
    """Check that a file's tensors are read as they should be, in any pieces, and that damaged files are refused.

    Parameters
    ----------
    path
        A file whose name ends in one of the registered suffixes.
    expected
        The bytes of each tensor as a merge sees it, row-major, little-endian, in the dtype of its reference.

    Raises
    ------
    AssertionError
        If a law is broken.
    """
    path = Path(path)
    assert any(path.name.endswith(suffix) for suffix in suffixes()), (
        f"{path.name}: no format is registered for this suffix; register one with @opens"
    )
    index = open_model(path)
    assert set(index) == set(expected), f"{path.name}: it holds {sorted(index)}, expected {sorted(expected)}"
    for name, data in expected.items():
        _check_ref(index[name], data, f"{path.name}: tensor {name!r}")
    _damaged_files_are_refused(path)


def _check_ref(ref: SourceRef, expected: bytes, title: str) -> None:
    width, n = itemsize(ref.dtype), ref.n_elements
    assert len(expected) == n * width == ref.nbytes, (
        f"{title}: shape {ref.shape} and dtype {ref.dtype} make {n * width} bytes, nbytes is {ref.nbytes}, "
        f"but {len(expected)} are expected"
    )
    assert pickle.loads(pickle.dumps(ref)) == ref, (
        f"{title}: its reference does not pickle; use a frozen dataclass"
    )
    chosen = random.Random(1)
    pairs = [sorted(chosen.choices(range(n + 1), k=2)) for _ in range(_RANGES)]
    for start, stop in [(0, n), *((a, b) for a, b in pairs if a < b)]:
        if start == stop:
            continue
        for reader in (Reader(), Reader("mmap")):
            found = _read(ref, reader, start, stop)
            assert found == expected[start * width : stop * width], (
                f"{title}: reading elements {start} to {stop} gives values that differ from the whole tensor's"
            )


def _read(ref: SourceRef, reader: Reader, start: int, stop: int) -> bytes:
    size = (stop - start) * itemsize(ref.dtype)
    target: NDArray[np.uint8] = np.full(size, 0xA5, np.uint8)
    ref.read(reader, start, stop, target, Scratch(np.empty(ref.scratch_bytes, np.uint8)))
    return target.tobytes()


def _damaged_files_are_refused(path: Path) -> None:
    """Truncate the file at several places and open it: it must raise a one-line ModelError that names the file."""
    data = path.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        cut = Path(folder) / path.name
        for size in sorted({0, 1, 7, 64, len(data) // 2, len(data) - 1} & set(range(len(data)))):
            cut.write_bytes(data[:size])
            said = ""
            try:
                open_file(cut)
            except InputError as error:
                said = str(error)
            except Exception as error:
                raise AssertionError(
                    f"{path.name}: truncated to {size} bytes, it raises {type(error).__name__}: {error}; raise ModelError"
                ) from error
            assert said, (
                f"{path.name}: truncated to {size} bytes, it is opened; compare the sizes with the file's"
            )
            assert path.name in said, f"{path.name}: the error does not name the file: {said}"
            assert "\n" not in said, f"{path.name}: the error has more than one line: {said}"
