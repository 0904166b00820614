"""One model on disk as a map from tensor names to where their bytes lie. Names decide; no
architecture is known."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.errors import ModelError, WorldError, printable
from streammerge.index.header import FileStamp, TensorRef, open_regular, read_header
from streammerge.index.hub import snapshot
from streammerge.index.strict_json import BadJson, parse_object

if TYPE_CHECKING:
    import numpy as np

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_INDEX = 100_000_000


class TensorIndex(Mapping[str, TensorRef]):
    """The tensors of one model, in file order, from headers alone.

    Attributes
    ----------
    reference
        The model as the config names it.
    directory
        Where it lies.
    stamps
        One stamp per file, sorted by path.
    unlisted
        Names that shards hold but the model's index does not list; they are left out.
    """

    def __init__(
        self, reference: str, directory: Path, tensors: Mapping[str, TensorRef],
        stamps: tuple[FileStamp, ...], unlisted: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.reference = reference
        self.directory = directory
        self.stamps = stamps
        self.unlisted = unlisted
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> TensorRef:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(ref.nbytes for ref in self._tensors.values())

    def view(self, name: str) -> np.memmap[Any, Any]:
        """Memory-map the bytes of one tensor, read-only, as uint8; made when asked for."""
        import numpy as np

        ref = self._tensors[name]
        return np.memmap(ref.path, dtype=np.uint8, mode="r", offset=ref.offset, shape=(ref.nbytes,))


def open_model(reference: str | os.PathLike[str], *, cache: Path | None = None) -> TensorIndex:
    """Index a model: a local directory, a ``.safetensors`` file, or a snapshot in the local hub cache.

    Raises
    ------
    ModelError
        If there is no such model or any of its files is malformed.
    """
    name = os.fspath(reference)
    if not name or "\0" in name:
        raise ModelError(f"{printable(name)!r}: not a path of a model")
    path = Path(name)
    try:
        if path.suffix == ".safetensors" and path.is_file():
            tensors, _, stamp = read_header(path)
            return TensorIndex(name, path.parent, tensors, (stamp,))
        directory = path if path.is_dir() else None
    except OSError as error:
        raise ModelError(f"{printable(name)}: {error.strerror}") from None
    if directory is None:
        if os.path.lexists(name):
            raise ModelError(f"{printable(name)}: not a model directory")
        directory = snapshot(name, cache)
    return _open_directory(name, directory)


def _open_directory(reference: str, directory: Path) -> TensorIndex:
    if os.path.lexists(directory / INDEX_NAME):
        return _open_indexed(reference, directory)
    if os.path.lexists(directory / SINGLE_NAME):
        shards = [directory / SINGLE_NAME]
    else:
        shards = sorted(directory.glob("*.safetensors"))
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"{printable(directory)}: a LoRA adapter; merge it into its base model first"
        )
    if not shards:
        pickles = any(directory.glob("*.bin")) or any(directory.glob("*.pt"))
        cure = "only pickles, which are not read: convert them to safetensors" if pickles else (
            "no *.safetensors files in it"
        )  # fmt: skip
        raise ModelError(f"{printable(directory)}: {cure}")
    tensors: dict[str, TensorRef] = {}
    stamps = []
    for shard in shards:
        part, _, stamp = read_header(shard)
        twice = next((name for name in part if name in tensors), None)
        if twice is not None:
            raise ModelError(
                f"{printable(shard)}: tensor {printable(twice)} is also in {printable(tensors[twice].path)}"
            )
        tensors.update(part)
        stamps.append(stamp)
    return TensorIndex(reference, directory, tensors, tuple(stamps))


def _open_indexed(reference: str, directory: Path) -> TensorIndex:
    weight_map = _weight_map(directory / INDEX_NAME)
    tensors: dict[str, TensorRef] = {}
    stamps, unlisted = [], []
    for shard in sorted(set(weight_map.values())):
        part, _, stamp = read_header(directory / shard)
        stamps.append(stamp)
        for name, ref in part.items():
            if weight_map.get(name) == shard:
                tensors[name] = ref
            elif name not in weight_map:
                unlisted.append(name)
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ModelError(
                f"{printable(directory / INDEX_NAME)}: tensor {printable(name)} is not in {printable(shard)}, "
                "where the index says it is"
            )
    return TensorIndex(reference, directory, tensors, tuple(stamps), tuple(unlisted))


def _weight_map(path: Path) -> dict[str, str]:
    descriptor = open_regular(path)
    try:
        with os.fdopen(descriptor, "rb") as file:
            raw = file.read(_MAX_INDEX + 1)
    except OSError as error:
        raise WorldError(f"{printable(path)}: {error.strerror}") from error
    if len(raw) > _MAX_INDEX:
        raise ModelError(f"{printable(path)}: larger than {_MAX_INDEX} bytes")
    try:
        weight_map = parse_object(raw).get("weight_map")
    except BadJson as error:
        raise ModelError(f"{printable(path)}: {printable(error)}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{printable(path)}: no `weight_map` object with tensors in it")
    for name, shard in weight_map.items():
        if not name or not isinstance(shard, str) or not _plain_name(shard):
            raise ModelError(
                f"{printable(path)}: tensor {printable(name)!r} is mapped to {printable(shard, 100)!r}, "
                "which is no *.safetensors file name in the same directory"
            )
    return weight_map


def _plain_name(name: str) -> bool:
    plain = name == os.path.basename(name) and "\0" not in name and "\\" not in name
    return plain and name.endswith(".safetensors") and len(name) <= 255
