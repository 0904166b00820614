"""Prove that a finished output is what was written: every byte of every file against the manifest."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.engine.checksum import crc32
from streammerge.engine.journal import STATE
from streammerge.engine.output import MANIFEST, read_manifest
from streammerge.errors import ModelError, StreammergeError, printable
from streammerge.index.model import open_model

_STEP = 8 << 20


@dataclass(frozen=True)
class Verdict:
    """What `verify` found."""

    files: int
    """Files checked."""
    nbytes: int
    """Bytes read."""
    problems: tuple[str, ...]
    """One line each; empty if the output is as it was written."""


def verify(out: Path) -> Verdict:
    """Re-read a finished output: sizes, checksums, names, and the structure a loader relies on.

    Raises
    ------
    ModelError
        If `out` holds no finished merge.
    """
    if not out.is_dir():
        raise ModelError(f"{printable(out)}: no such directory")
    if (out / STATE).exists():
        raise ModelError(
            f"{printable(out)}: the merge is not finished; run the same `streammerge merge` again"
        )
    manifest = read_manifest(out)
    if manifest is None:
        raise ModelError(f"{printable(out)}: no sound {MANIFEST} in it; not the output of a finished merge")
    problems: list[str] = []
    nbytes = 0
    tensors = _tensor_ranges(out, problems)
    for name, entry in manifest["files"].items():
        nbytes += _check_file(out, name, entry, manifest.get("tensors", {}), tensors, problems)
    known = {*manifest["files"], MANIFEST}
    problems += [
        f"{printable(entry.name)}: not in the manifest"
        for entry in sorted(out.iterdir())
        if entry.name not in known and entry.name.startswith("model")
    ]
    recorded = set(manifest.get("tensors", {}))
    if tensors and set(tensors) != recorded:
        odd = sorted(set(tensors) ^ recorded)[0]
        problems.append(f"tensor {printable(odd)}: in the files or in the manifest, not in both")
    return Verdict(len(manifest["files"]), nbytes, tuple(problems))


def _tensor_ranges(out: Path, problems: list[str]) -> dict[str, tuple[str, int, int]]:
    """Return where each tensor lies, read as any loader would: (file name, offset, nbytes)."""
    try:
        index = open_model(out)
    except StreammergeError as error:
        problems.append(str(error))
        return {}
    if index.unlisted:
        problems.append(f"{len(index.unlisted)} tensors are in the shards but not in the index")
    return {name: (os.path.basename(r.path), r.offset, r.nbytes) for name, r in index.items()}


def _check_file(
    out: Path, name: str, entry: Any, crcs: dict[str, str],
    tensors: dict[str, tuple[str, int, int]], problems: list[str],
) -> int:  # fmt: skip
    path = out / name
    if Path(name).name != name or not isinstance(entry, dict):
        problems.append(f"{MANIFEST}: entry {printable(name)!r} is malformed")
        return 0
    if path.is_symlink() or not path.is_file():
        problems.append(f"{printable(name)}: missing, or not a regular file")
        return 0
    size = path.stat().st_size
    if size != entry.get("nbytes"):
        problems.append(f"{printable(name)}: {size} bytes, {entry.get('nbytes')} were written")
        return 0
    if f"{_file_crc(path, 0, size):08x}" == entry.get("crc32"):
        return size
    inside = [t for t, (file, _, _) in tensors.items() if file == name]
    damaged = [t for t in inside if f"{_file_crc(path, tensors[t][1], tensors[t][2]):08x}" != crcs.get(t)]
    what = f"tensor {printable(damaged[0])} is damaged" if damaged else "its bytes have changed"
    problems.append(f"{printable(name)}: {what} (checksum {entry.get('crc32')} recorded)")
    return size


def _file_crc(path: Path, offset: int, nbytes: int) -> int:
    value = 0
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while nbytes > 0 and (data := file.read(min(_STEP, nbytes))):
            value = crc32(data, value)
            nbytes -= len(data)
    return value
