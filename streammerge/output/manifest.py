"""The manifest of a finished output: a record of what was written, with its own checksum.

Anyone can compute the checksum, so every field is checked for its type and bounds as well, and an invalid manifest is
refused in one line.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from streammerge.checkpoint.sidecar_names import is_sound_path
from streammerge.dtypes import BITS
from streammerge.errors import ModelError, StreammergeError
from streammerge.formats.safetensors import MAX_RANK
from streammerge.io.files import bad, place, quoted, read_exactly, reading
from streammerge.io.strict_json import MAX_NBYTES, parse_object
from streammerge.lazy import late_pattern
from streammerge.numerics.crc32 import crc32
from streammerge.output.place import place_of

FORMAT = 2

_SEAL = b'\n"manifest_crc32": '
_CRC = late_pattern(r"[0-9a-f]{8}", re.ASCII)
_MOST = 2**63


def seal(manifest: Mapping[str, Any]) -> bytes:
    """Return the manifest as JSON whose last field is the checksum of everything before it."""
    text = indented(manifest, 1)
    assert text.endswith(b"\n}")
    text[-2:] = b","
    text += _SEAL + b'"%08x"\n}\n' % crc32(text)
    return bytes(text)


def indented(value: Mapping[str, Any], indent: int) -> bytearray:
    """Return a value as JSON, built part by part: `dumps` holds all parts at once, a multiple of the text's size."""
    text = bytearray()
    for part in json.JSONEncoder(indent=indent, ensure_ascii=False).iterencode(value):
        text += part.encode()
    return text


def read_manifest(out: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished output; None if there is none, or if it is invalid."""
    try:
        return load_manifest(out)
    except StreammergeError:
        return None


def load_manifest(out: Path) -> dict[str, Any]:
    """Return the manifest of a finished output; the manifest of a single file gets the file's current name.

    Raises
    ------
    ModelError
        If it is missing, not a regular file, damaged, or not a manifest that a merge writes.
    WorldError
        If the machine cannot read it.
    """
    lies = place_of(out)
    path = str(lies.manifest)
    if os.path.islink(path):
        raise bad(path, "is a symbolic link, which streammerge did not make")
    with reading(path) as (fd, status):
        if status.st_size > MAX_NBYTES:
            raise bad(path, f"has {status.st_size} bytes, more than {MAX_NBYTES}")
        raw = read_exactly(fd, status.st_size, 0, path)
    body = raw[: max(0, raw.rfind(_SEAL))]
    if raw != body + _SEAL + b'"%08x"\n}\n' % crc32(body):
        raise bad(path, "is damaged: its checksum does not match")
    manifest = parse_object(raw, path, "the manifest", "finite")
    if manifest.get("format") != FORMAT:
        raise bad(path, f"of format {quoted(str(manifest.get('format')), 40)}; this version reads {FORMAT}")
    for field, (holds, otherwise) in _FIELDS.items():
        if field in manifest or field in _NEEDED:
            _check(holds, manifest.get(field), path, field, otherwise)
    if lies.file is not None:
        _check(lambda files: len(files) == 1, manifest["files"], path, "files", "one file")
        (entry,) = manifest["files"].values()
        manifest["files"] = {lies.file: entry}
    return manifest


def _check(holds: Callable[[Any], bool], value: Any, path: str, field: str, otherwise: str) -> None:
    if not holds(value):
        raise ModelError(f"{place(path)}: not a valid manifest: `{field}` is not {otherwise}")


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _fraction(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _counts(value: Any) -> bool:
    return isinstance(value, dict) and all(_natural(count) for count in value.values())


def _map_of(entry: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(entry, value.values()))


def _list_of(entry: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(entry, value))


def _entry(**fields: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict) and all(holds(value.get(name)) for name, holds in fields.items())
    )


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _crc(value: Any) -> bool:
    return isinstance(value, str) and _CRC.fullmatch(value) is not None


def _dtype(value: Any) -> bool:
    return isinstance(value, str) and value in BITS


def _shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_RANK and all(map(_natural, value))


def _files(value: Any) -> bool:
    entry = _entry(nbytes=_natural, crc32=_crc)
    return (
        isinstance(value, dict)
        and bool(value)
        and all(map(is_sound_path, value))
        and all(map(entry, value.values()))
    )


def _norm(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _adapter(value: Any) -> bool:
    module = _entry(rank=_natural, norm=_norm, residual=_norm)
    return _entry(residual=_norm, modules=_map_of(module))(value)


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "streammerge": (_text, "a version"),
    "method": (_text, "a name"),
    "seed": (lambda value: type(value) is int and 0 <= value < 2**64, "a seed"),
    "identity": (_texts, "a map of strings"),
    "inputs": (
        _list_of(lambda one: _entry(role=_text, fingerprint=_text)(one) and _texts(one.get("sha256", {}))),
        "a list of inputs",
    ),
    "fisher_sha256": (_list_of(_texts), "a list of content hashes"),
    "densities": (
        _list_of(_entry(model=_natural, kept=_natural, of=_natural, density=_fraction)),
        "a list of densities",
    ),
    "floored": (_entry(elements=_natural, of=_natural, fraction=_fraction), "two numbers and their fraction"),
    "not_finite": (_counts, "a map of numbers of elements"),
    "adapter": (_adapter, "the residuals of an adapter"),
    "folders": (_list_of(lambda one: _text(one) and is_sound_path(one)), "a list of folders"),
    "files": (_files, "a map of file names to sizes and checksums"),
    "tensors": (
        _map_of(_entry(dtype=_dtype, shape=_shape, crc32=_crc)),
        "a map of tensors to dtypes, shapes and checksums",
    ),
}
"""The check of each field; other fields are ignored."""
_NEEDED = frozenset(_FIELDS) - {"adapter", "fisher_sha256", "floored", "folders", "not_finite"}
