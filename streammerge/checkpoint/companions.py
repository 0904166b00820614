"""Indexes of a model's Fisher diagonal or Gram matrices. An index maps tensor names to the positions of values.

The values are in a safetensors file (or directory) with the model's own names and shapes, or in a store
(`streammerge.formats.zarr_store`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any

from streammerge.checkpoint.index import TensorIndex, open_model
from streammerge.dtypes import FLOATS
from streammerge.formats.refs import TensorRef
from streammerge.formats.safetensors import SUFFIX
from streammerge.formats.torch_file import PICKLES
from streammerge.formats.zarr_chunks import ChunkedRef
from streammerge.formats.zarr_store import ATTRIBUTE, GRAM_ATTRIBUTE, read_table
from streammerge.io import volumes
from streammerge.io.files import bad, expanded, meant, quoted
from streammerge.io.stamp import FileStamp
from streammerge.records import dataclass

CompanionRef = TensorRef | ChunkedRef


@dataclass(frozen=True, eq=False)
class CompanionIndex(Mapping[str, CompanionRef]):
    """The Fisher diagonal of one model, or its Gram matrices."""

    reference: str
    """The reference in the config."""
    refs: Mapping[str, CompanionRef]
    stamps: tuple[FileStamp, ...]
    model: TensorIndex | None = None
    """The safetensors file as a model; None for a store."""
    fingerprint: str | None = None
    """Fingerprint of the model that the diagonal belongs to; None if it is not recorded."""
    model_name: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    """A store's attributes; they include its table only on request."""

    @property
    def has_chunks(self) -> bool:
        """Whether the values are in chunk files, as in a store; chunk files have no stamps of their own."""
        return self.model is None

    def __getitem__(self, name: str) -> CompanionRef:
        return self.refs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.refs)

    def __len__(self) -> int:
        return len(self.refs)


def open_fisher(reference: str | os.PathLike[str], *, with_table: bool = False) -> CompanionIndex:
    """Read the table of a store, or the headers of safetensors files, of Fisher diagonals.

    Parameters
    ----------
    with_table
        Whether to keep a store's table among its attributes, which takes several times the index's memory.

    Raises
    ------
    ModelError
        If it is missing, malformed, unfinished, or not a diagonal.
    WorldError
        If the machine cannot read it.
    """
    reference = expanded(os.fspath(reference))
    volumes.forget(reference)
    if reference.endswith(PICKLES):
        raise bad(reference, "a PyTorch file: make a store of it with `streammerge fisher import`")
    if volumes.isdir(reference) and not _holds_safetensors(reference):
        return _open_store(reference, ATTRIBUTE, "Fisher diagonals", with_table)
    if not volumes.exists(reference):
        raise bad(reference, f"no such Fisher diagonal (a store, or a safetensors file){meant(reference)}")
    model = open_model(reference)
    refs = model.stored()
    for ref in refs.values():
        if ref.dtype not in FLOATS:
            raise bad(
                ref.path, f"tensor {quoted(ref.name)} is {ref.dtype}: a Fisher diagonal is made of floats"
            )
    return CompanionIndex(reference, refs, model.stamps, model)


def open_grams(reference: str | os.PathLike[str], *, with_table: bool = False) -> CompanionIndex:
    """Read the table of a store of Gram matrices, [inputs, inputs] per linear map, by the weight's name.

    Parameters
    ----------
    with_table
        As in `open_fisher`.

    Raises
    ------
    ModelError
        If it is missing, malformed, unfinished, or not a store of Gram matrices.
    WorldError
        If the machine cannot read it.
    """
    reference = expanded(os.fspath(reference))
    volumes.forget(reference)
    if not volumes.isdir(reference):
        raise bad(reference, f"no such store of Gram matrices{meant(reference)}")
    return _open_store(reference, GRAM_ATTRIBUTE, "Gram matrices", with_table)


def _holds_safetensors(directory: str) -> bool:
    try:
        return any(name.endswith(SUFFIX) for name in volumes.listdir(directory))
    except OSError:
        return False


def _open_store(directory: str, attribute: str, what: str, with_table: bool) -> CompanionIndex:
    table = read_table(directory, attribute, what, with_table=with_table)
    fingerprint, model_name = table.about.get("model_fingerprint"), table.about.get("model_name", "")
    return CompanionIndex(
        directory,
        table.refs,
        (table.stamp,),
        fingerprint=fingerprint if isinstance(fingerprint, str) else None,
        model_name=model_name if isinstance(model_name, str) else "",
        about=table.about,
    )
