"""Find the files of a directory that make up the model, and read their index."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from streammerge.checkpoint.weight_sets import WeightSet, find_sets, no_model
from streammerge.formats.torch_dcp import MEGATRON, METADATA
from streammerge.io import volumes
from streammerge.io.files import bad, from_os, quoted
from streammerge.io.strict_json import read_object
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_OF_ACCELERATE = late_pattern(r"pytorch_model_fsdp_\d+", re.ASCII)
"""The folder in which accelerate (and hence the Trainer) stores the weights of a model sharded over processes."""


@dataclass(frozen=True, slots=True)
class Shards:
    """The files of a model by name, and the shard of each tensor according to the index (None without an index)."""

    names: tuple[str, ...]
    weight_map: dict[str, str] | None
    notes: tuple[str, ...] = ()
    """Notes on files that were left out."""
    index: str = ""
    """The name of the index file; empty without one."""


def find_shards(directory: Path) -> Shards:
    """Return the files of the model in `directory`: one complete set (`streammerge.checkpoint.weight_sets`).

    Files whose names no library uses form one model together if there are no other weights. PyTorch files that hold
    something else (optimizers, arguments) are ignored.

    Raises
    ------
    ModelError
        If there is no model, or only one in an unsupported format, or a shard is missing.
    """
    try:
        present = frozenset(volumes.listdir(directory))
    except OSError as error:
        raise from_os(str(directory), error) from error
    found = find_sets(present)
    if not found and (metadata := find_distributed(directory, present)):
        return Shards((metadata,), None)
    if not found and "adapter_config.json" in present:
        raise bad(
            str(directory),
            "a LoRA adapter, not a model: write `base+adapter`, the model that it was trained on before it",
        )
    if not found:
        raise bad(str(directory), no_model(present))
    ready = [
        some for some in found if some.index is None or _has_shards(directory / some.index, some, present)
    ]
    best, *others = ready or found
    if best.missing:
        count = best.missing + len(best.names)
        what = f"{len(best.names)} of {count} shards {quoted(best.stem)} and no index: download again"
        raise bad(str(directory), what)
    weight_map = None
    names: tuple[str, ...] = best.names
    if best.index is not None:
        weight_map = _read_index(str(directory / best.index), present, best.suffix)
        names = tuple(sorted(set(weight_map.values())))
    taken = set(names)
    others = [some for some in found if some is not best and (not some.names or not set(some.names) <= taken)]
    return Shards(names, weight_map, _about(best, others), best.index or "")


def find_distributed(directory: Path, present: Collection[str]) -> str:
    """Return the ``.metadata`` of a torch.distributed.checkpoint directory, or of accelerate's folder inside it.

    Raises
    ------
    ModelError
        If Megatron wrote it in an unsupported format.
    """
    folders = [name for name in sorted(present) if _OF_ACCELERATE.fullmatch(name)]
    for name in (METADATA, *(f"{folder}/{METADATA}" for folder in folders)):
        if volumes.lexists(directory / name):
            return name
    if "common.pt" in present and MEGATRON in present:
        backend = read_object(str(directory / MEGATRON), "finite").get("sharded_backend")
        raise bad(
            str(directory),
            f"a checkpoint of Megatron in its format {quoted(str(backend), 40)}: only torch_dist is read",
        )
    return ""


def _has_shards(path: Path, some: WeightSet, present: Collection[str]) -> bool:
    """Return whether any shard named by an index exists; an index may have been downloaded without its shards."""
    if not volumes.isfile(path) or some.names:
        return True
    return any(shard in present for shard in set(_read_index(str(path), None, some.suffix).values()))


def _about(best: WeightSet, others: Collection[WeightSet]) -> tuple[str, ...]:
    if not others:
        return ()
    names = ", ".join(quoted(some.title, 60) for some in list(others)[:4])
    more = f" and {len(others) - 4} more" if len(others) > 4 else ""
    return (f"its weights are there more than once: {quoted(best.title, 60)} is taken, not {names}{more}",)


def _read_index(path: str, present: Collection[str] | None, suffix: str) -> dict[str, str]:
    """Return the weight map of the index at `path`; every shard is checked to be a file among `present`, if given."""
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


def _check_shard(path: str, tensor: str, shard: str, present: Collection[str] | None, suffix: str) -> None:
    """Refuse a shard name that could lead out of the directory, or to a file of a different kind."""
    where = f"weight_map: the shard {quoted(shard)} of tensor {quoted(tensor)}"
    if shard in ("", ".", "..") or any(c in shard for c in "/\\\0") or len(shard) > 255:
        raise bad(path, f"{where} is not a plain file name")
    if not shard.endswith(suffix):
        raise bad(path, f"{where} is not a {suffix} file")
    if present is not None and shard not in present:
        raise bad(path, f"{where} is missing: download or copy the model again")
