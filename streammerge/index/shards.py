"""Which files of a directory make up the model, and what its index says about them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from streammerge.errors import ModelError
from streammerge.index.files import bad, from_os, quoted
from streammerge.index.strict_json import read_object

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SUFFIX = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_NUMBERED = re.compile(r"(.*)-(\d{1,9})-of-(\d{1,9})\.safetensors", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Shards:
    """The files of a model, by name, and where its index puts each tensor (None without one)."""

    names: tuple[str, ...]
    weight_map: dict[str, str] | None


def find_shards(directory: Path) -> Shards:
    """Return the safetensors files of the model in `directory`.

    The index decides if there is one; else ``model.safetensors``; else all ``*.safetensors``
    together (hidden files aside).

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
        weight_map = _read_index(str(directory / INDEX_NAME), present)
        return Shards(tuple(sorted(set(weight_map.values()))), weight_map)
    if SINGLE_NAME in present:
        return Shards((SINGLE_NAME,), None)
    if "adapter_config.json" in present:
        raise bad(
            str(directory),
            "a LoRA adapter, which is not supported yet: merge it into its base model first",
        )
    names = sorted(n for n in present if n.endswith(SUFFIX) and not n.startswith("."))
    if not names:
        raise _nothing(directory, present)
    _refuse_gaps(directory, names)
    return Shards(tuple(names), None)


def pickle_refusal(path: str) -> ModelError:
    """Return the refusal of a pickled checkpoint."""
    return bad(
        path,
        "pickled weights are not read in this version: convert them to safetensors first "
        "(load the model with transformers, then save_pretrained)",
    )


def _nothing(directory: Path, present: Collection[str]) -> ModelError:
    pickles = sorted(name for name in present if name.endswith(PICKLES))
    if pickles:
        return pickle_refusal(str(directory / pickles[0]))
    return bad(str(directory), f"no model here: neither {INDEX_NAME} nor any *{SUFFIX} file")


def _read_index(path: str, present: Collection[str]) -> dict[str, str]:
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
            _check_shard(path, tensor, shard, present)
            checked.add(shard)
    return weight_map


def _check_shard(path: str, tensor: str, shard: str, present: Collection[str]) -> None:
    """Refuse a shard name that could lead out of the directory, or to no safetensors file."""
    where = f"weight_map: the shard {quoted(shard)} of tensor {quoted(tensor)}"
    if shard in ("", ".", "..") or any(c in shard for c in "/\\\0") or len(shard) > 255:
        raise bad(path, f"{where} is not a plain file name")
    if not shard.endswith(SUFFIX):
        raise bad(path, f"{where} is not a {SUFFIX} file")
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
