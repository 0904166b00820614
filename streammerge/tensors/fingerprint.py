"""Identify a model cheaply by its content: all names, dtypes and shapes, and samples of the values.

The fingerprint does not depend on paths, shards or dates. Two fine-tunes differ in almost every sampled block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import numpy as np

from streammerge.checkpoint.companions import CompanionIndex
from streammerge.checkpoint.index import TensorIndex
from streammerge.errors import ModelError, printable
from streammerge.formats.refs import SourceRef, middle_of
from streammerge.io.buffer_pool import Bytes
from streammerge.io.reader import Reader
from streammerge.io.stamp import FileStamp
from streammerge.tensors.read import read_elements

_TENSORS = 256


def fingerprint(index: TensorIndex, reader: Reader) -> str:
    """Return 32 hexadecimal digits. The samples are 4 KiB from the middle of up to 256 tensors spread over the names.

    For a model with an adapter, the fingerprint covers the adapted model, the adapter's tensors and its settings.
    """
    digest = hashlib.blake2b(digest_size=16)
    _add_tensors(digest, index, reader)
    if index.adapter is not None:
        _add_tensors(digest, index.adapter.tensors, reader)
        digest.update(
            json.dumps(dict(index.adapter.settings.entries), sort_keys=True).encode("utf-8", "surrogatepass")
        )
    return digest.hexdigest()


def _add_tensors(digest: hashlib.blake2b, tensors: Mapping[str, SourceRef], reader: Reader) -> None:
    names = sorted(tensors)
    table = [[name, tensors[name].stored_dtype, list(tensors[name].shape)] for name in names]
    digest.update(json.dumps(table).encode("utf-8", "surrogatepass"))
    sampled = names[:: max(1, -(-len(names) // _TENSORS))]
    samples: dict[str, Bytes] = {}
    parts: dict[str, list[tuple[int, list[memoryview]]]] = {}
    for name in sampled:
        if (plain := tensors[name].plain) is not None:
            offset, size = middle_of(plain.nbytes)
            samples[name] = np.empty(size, np.uint8)
            parts.setdefault(plain.path, []).append((plain.offset + offset, [samples[name].data]))
    for path, some in parts.items():  # together: a store answers one request as late as sixteen
        reader.read_parts(path, some)
    for name in sampled:
        ref = tensors[name]
        buffer = samples[name] if name in samples else read_elements(reader, ref, *ref.sample)
        digest.update(buffer.tobytes())


def files_digest(stamps: Iterable[FileStamp]) -> str:
    """Return a digest that identifies the files themselves while work on them is unfinished."""
    digest = hashlib.blake2b(digest_size=16)
    for s in stamps:
        digest.update(repr((s.nbytes, s.mtime_ns, s.ctime_ns, s.inode, s.header_digest)).encode())
    return digest.hexdigest()


def companion_digest(index: CompanionIndex, reader: Reader) -> str:
    """Return a digest that identifies a Fisher diagonal: of the content for a file, of the table for a store."""
    return index.stamps[0].header_digest if index.model is None else fingerprint(index.model, reader)


def check_belongs(
    diagonal: CompanionIndex, model: TensorIndex, what: str = "Fisher diagonal", reader: Reader | None = None
) -> None:
    """Refuse a Fisher diagonal, or other companion (`what`), that was recorded for a model with different content.

    Parameters
    ----------
    reader
        The reader of the model; None for the default.

    Raises
    ------
    ModelError
        If the contents differ; the message names the diagonal, its model, and the given model.
    """
    if diagonal.fingerprint is None:
        return
    given = reader
    reader = given or Reader()
    try:
        found = fingerprint(model, reader)
    finally:
        if given is None:
            reader.close()
    if found != diagonal.fingerprint:
        raise ModelError(
            f"{printable(diagonal.reference)}: this {what} belongs to model "
            f"{printable(diagonal.model_name, 120)!r} ({diagonal.fingerprint}), not to {printable(model.reference)} "
            f"({found}); give each model its own {what}"
        )
