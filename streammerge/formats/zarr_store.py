"""Read the table of a store: a Zarr 3 group with one array per tensor, of Fisher diagonals or Gram matrices.

Only the group's ``zarr.json`` is read here. Its attributes hold a table of all arrays; a store without the table is
unfinished. `streammerge.formats.zarr_writer` writes stores, and any Zarr reader opens them.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from typing import Any

from streammerge.errors import ModelError
from streammerge.formats.zarr_chunks import MADE_BY, ChunkedRef, cut_axis
from streammerge.io import volumes
from streammerge.io.files import bad, quoted, read_exactly, reading
from streammerge.io.stamp import FileStamp
from streammerge.io.strict_json import MAX_NBYTES, parse_object
from streammerge.records import dataclass

GROUP_FILE = "zarr.json"
ATTRIBUTE = "streammerge_fisher"
GRAM_ATTRIBUTE = "streammerge_gram"
"""The attribute with the table of a store of Gram matrices."""
KINDS = {
    ATTRIBUTE: ("Fisher diagonals", "streammerge fisher info"),
    GRAM_ATTRIBUTE: ("Gram matrices", "streammerge gram info"),
}
"""The kind of content of a store by its attribute, with the command that shows it."""
FORMAT = 1
STORED = {"F32": "float32", "BF16": "uint16"}
"""Dtypes of a store, with Zarr's data type: Zarr has no bfloat16, so its bit patterns are stored as uint16."""


@dataclass(frozen=True)
class StoreTable:
    """The table of a store."""

    refs: Mapping[str, ChunkedRef]
    """The arrays by tensor name."""
    stamp: FileStamp
    """The stamp of the group's ``zarr.json``."""
    about: Mapping[str, Any]
    """The group's attributes; they include the table only on request."""


def read_table(directory: str, attribute: str, what: str, *, with_table: bool) -> StoreTable:
    """Read the table of a store.

    Parameters
    ----------
    attribute
        The group's attribute that holds the table.
    what
        The kind of content of the store: a key of `MADE_BY`.
    with_table
        Whether to keep the table among the attributes, which takes several times the memory of the refs.

    Raises
    ------
    ModelError
        If it is missing, malformed, unfinished, or not a store of this kind.
    WorldError
        If the machine cannot read it.
    """
    cure = MADE_BY[what]
    path = os.path.join(directory, GROUP_FILE)
    if not volumes.lexists(path):
        raise bad(directory, f"neither a Zarr store (no {GROUP_FILE}) nor safetensors")
    with reading(path) as (fd, status):
        if status.st_size > MAX_NBYTES:
            raise bad(path, f"has {status.st_size} bytes, more than {MAX_NBYTES}")
        raw = read_exactly(fd, status.st_size, 0, path)
    group = parse_object(raw, path, "the group", "finite")
    attributes = group.get("attributes")
    attributes = attributes if isinstance(attributes, dict) else {}
    about = attributes.get(attribute)
    for other, (kind, see) in KINDS.items():
        if about is None and other in attributes:
            raise bad(path, f"a store of {kind}, not of {what}: see `{see}`")
    if group.get("zarr_format") != 3 or not isinstance(about, dict):
        raise bad(path, f"not a store of {what}, or an unfinished one: run `{cure}`")
    if about.get("format") != FORMAT:
        raise bad(
            path, f"a store of format {quoted(str(about.get('format')), 40)}, this version reads {FORMAT}"
        )
    table = about.get("tensors")
    if not isinstance(table, dict) or not table:
        raise bad(path, f"its table of tensors is missing or empty: make it again with `{cure}`")
    refs = {name: _store_ref(name, entry, directory, path, what) for name, entry in table.items()}
    if not with_table:
        del about["tensors"]
    return StoreTable(refs, FileStamp.of(path, status, raw), about)


def _store_ref(name: str, entry: Any, directory: str, path: str, kind: str) -> ChunkedRef:
    def refuse(what: str) -> ModelError:
        return bad(path, f"tensor {quoted(name)}: {what}")

    if not isinstance(entry, dict):
        raise refuse("its entry is not an object")
    array, dtype = entry.get("array"), entry.get("dtype")
    shape: Any = entry.get("shape")
    chunk: Any = entry.get("chunk")
    if not isinstance(array, str) or array in ("", ".", "..") or any(c in array for c in "/\\\0"):
        raise refuse("its array is not a plain name")
    if not isinstance(dtype, str) or dtype not in STORED:
        raise refuse(f"dtype {quoted(str(dtype), 40)} is none of {', '.join(STORED)}")
    if not _sizes(shape) or not _sizes(chunk) or len(shape) != len(chunk) or 0 in chunk:
        raise refuse("its shape or chunk is not a list of sizes")
    axis = cut_axis(tuple(shape), tuple(chunk))
    if any(c != 1 for c in chunk[:axis]) or chunk[axis + 1 :] != shape[axis + 1 :]:
        raise refuse("its chunks are not runs of elements: make the store again")
    if math.prod(chunk) * 4 > 1 << 31:
        raise refuse("its chunks are larger than 2 GiB: make the store again")
    for key in ("sum", "square_sum", "largest", "zeros", "stored_nbytes"):
        number = entry.get(key)
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < 2**1000:
            raise refuse(f"its {key} is no number of 0 or more")
    return ChunkedRef(
        sys.intern(name),
        sys.intern(dtype),
        tuple(shape),
        str(volumes.as_path(directory) / array),
        tuple(chunk),
        float(entry["square_sum"]),
        int(entry["stored_nbytes"]),
        kind,
    )


def _sizes(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 2**62 for n in value)
    )
