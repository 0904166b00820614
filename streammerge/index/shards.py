"""Which files of a directory make up the model, and what its index says about them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from streammerge.index.files import bad, from_os, quoted
from streammerge.index.strict_json import read_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SUFFIX = ".safetensors"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_SUFFIX = ".bin"
PICKLES = (PICKLE_SUFFIX, ".pt", ".pth", ".ckpt")

_NUMBERED = re.compile(r"(.*)-(\d{1,9})-of-(\d{1,9})\.(?:safetensors|bin)", re.ASCII | re.DOTALL)
_NUMBERED_PICKLE = re.compile(r"pytorch_model-\d{1,9}-of-\d{1,9}\.bin", re.ASCII)


@dataclass(frozen=True, slots=True)
class Shards:
    """The files of a model, by name, and where its index puts each tensor (None without one)."""

    names: tuple[str, ...]
    weight_map: dict[str, str] | None
    notes: tuple[str, ...] = ()
    """What is said of files that were not taken."""


def find_shards(directory: Path) -> Shards:
    """Return the files of the model in `directory`.

    Safetensors first: the index decides if there is one; else ``model.safetensors``; else all ``*.safetensors``
    together (hidden files aside). Where there is none, the same for ``pytorch_model*.bin``; other PyTorch files
    (optimizers, arguments) are no models.

    Raises
    ------
    ModelError
        If there is no model, or only one that this version does not read, or a shard is missing.
    """
    try:
        present = frozenset(os.listdir(directory))
    except OSError as error:
        raise from_os(str(directory), error) from error
    if INDEX_NAME in present:
        return _indexed(directory / INDEX_NAME, present, SUFFIX)
    if SINGLE_NAME in present:
        return Shards((SINGLE_NAME,), None)
    if "adapter_config.json" in present:
        raise bad(
            str(directory),
            "a LoRA adapter, not a model: write `base+adapter`, the model that it was trained on before it",
        )
    names = sorted(n for n in present if n.endswith(SUFFIX) and not n.startswith("."))
    if not names and PICKLE_INDEX_NAME in present:
        return _indexed(directory / PICKLE_INDEX_NAME, present, PICKLE_SUFFIX)
    if not names and PICKLE_NAME in present:
        return Shards((PICKLE_NAME,), None)
    names = names or sorted(n for n in present if _NUMBERED_PICKLE.fullmatch(n))
    if not names:
        raise bad(
            str(directory), f"no model here: neither {INDEX_NAME} nor any *{SUFFIX} file, nor {PICKLE_NAME}"
        )
    _refuse_gaps(directory, names)
    return Shards(tuple(names), None)


def _indexed(path: Path, present: Collection[str], suffix: str) -> Shards:
    weight_map = _read_index(str(path), present, suffix)
    return Shards(tuple(sorted(set(weight_map.values()))), weight_map)


def _read_index(path: str, present: Collection[str], suffix: str) -> dict[str, str]:
    """Return the weight map of the index at `path`, each shard in it a file of its directory."""
    weight_map = read_object(path, "finite").get("weight_map")
    if not isinstance(weight_map, dict):
        raise bad(path, "has no weight_map (a map from tensors to shards)")
    if not weight_map:
        raise bad(path, "its weight_map is empty")
    checked: set[str] = set()
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise bad(path, f"weight_map: the shard of tensor {quoted(tensor)} is not a string")
        if shard not in checked:
            _check_shard(path, tensor, shard, present, suffix)
            checked.add(shard)
    return weight_map


def _check_shard(path: str, tensor: str, shard: str, present: Collection[str], suffix: str) -> None:
    """Refuse a shard name that could lead out of the directory, or to a file of another kind."""
    where = f"weight_map: the shard {quoted(shard)} of tensor {quoted(tensor)}"
    if shard in ("", ".", "..") or any(c in shard for c in "/\\\0") or len(shard) > 255:
        raise bad(path, f"{where} is not a plain file name")
    if not shard.endswith(suffix):
        raise bad(path, f"{where} is not a {suffix} file")
    if shard not in present:
        raise bad(path, f"{where} is missing: download or copy the model again")


def _refuse_gaps(directory: Path, names: list[str]) -> None:
    """Refuse ``x-00001-of-00003`` without its sisters: no index would tell that tensors lack."""
    sets: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            sets.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), numbers in sets.items():
        if len(numbers) < count:
            what = f"{len(numbers)} of {count} shards {quoted(stem)} and no index: download again"
            raise bad(str(directory), what)
