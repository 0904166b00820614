"""A model as an index that maps tensor names to the positions of their bytes, read from headers.

No list of architectures is needed; names decide.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from streammerge.checkpoint.adapters.apply import adapt
from streammerge.checkpoint.adapters.files import ADAPTER_CONFIG, Adapter, read_adapter, split_reference
from streammerge.checkpoint.adapters.images import is_image_adapter, read_image_adapter
from streammerge.checkpoint.hub import cache_directory
from streammerge.checkpoint.locating import exists, locate_in
from streammerge.checkpoint.names import is_tied_copy
from streammerge.checkpoint.pipeline import LISTS, is_pipeline, read_pipeline
from streammerge.checkpoint.quantization import DECLARED_BESIDE, Quantization, quantization_of
from streammerge.checkpoint.quantized.declarations import declaration_of
from streammerge.checkpoint.quantized.registry import decoded
from streammerge.checkpoint.refs.float8 import with_floats
from streammerge.checkpoint.shards import INDEX_NAME, SINGLE_NAME, Shards, find_shards
from streammerge.checkpoint.weight_sets import no_model
from streammerge.dtypes import FLOATS8
from streammerge.errors import ModelError, printable
from streammerge.formats.parts import contiguous
from streammerge.formats.refs import SourceRef, TensorRef
from streammerge.formats.registry import Contents, open_file, suffixes
from streammerge.formats.safetensors import SUFFIX
from streammerge.io import volumes
from streammerge.io.files import bad, place, quoted
from streammerge.io.stamp import FileStamp
from streammerge.io.strict_json import read_object
from streammerge.records import dataclass

__all__ = ["CONFIG_NAME", "INDEX_NAME", "SINGLE_NAME", "TensorIndex", "open_model"]

CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class Component:
    """A folder of a model whose weights a library reads separately, such as ``unet`` or ``2_Dense``."""

    folder: str
    config: Mapping[str, Any]
    """The content of the folder's config.json."""
    names: frozenset[str]
    """Names of its weight files."""


@dataclass(frozen=True, eq=False)
class TensorIndex(Mapping[str, SourceRef]):
    """The tensors of a model in the order of their bytes: by shard, then by offset."""

    reference: str
    """The model's reference in the config."""
    directory: Path
    """The directory of its files, including tokenizer and config."""
    stamps: tuple[FileStamp, ...]
    """Stamps of all files read, sorted by path."""
    tensors: Mapping[str, SourceRef]
    unlisted: tuple[str, ...] = ()
    """Tensors that are in a shard but not in the index file, and therefore not part of the model."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The content of config.json (for a pipeline: model_index.json); empty if there is none."""
    adapter: Adapter | None = None
    """The adapter that is applied to its weights."""
    notes: tuple[str, ...] = ()
    """Notes for the user on how it was read."""
    quantization: Quantization | None = None
    """Tensors with codes that are not decoded, and tensors that belong to them; None if there are none."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata in the header of a single-file model."""
    activations: Mapping[str, SourceRef] = field(default_factory=dict)
    """Scales of a quantised model's activations, which are not weights."""
    coded: Mapping[str, SourceRef] = field(default_factory=dict)
    """The stored tensors of its quantised weights."""
    components: tuple[Component, ...] = ()
    """The folders of weights whose tensors are included as ``FOLDER/name``."""
    settings_file: str = CONFIG_NAME
    """The file that `config` is read from."""

    def __getitem__(self, name: str) -> SourceRef:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors of the model."""
        return sum(ref.nbytes for ref in self.tensors.values())

    @property
    def stored_formats(self) -> dict[str, int]:
        """The formats of its quantised tensors, as `inspect` shows them, with the number of tensors in each."""
        return dict(Counter(ref.stored_format for ref in self.tensors.values() if ref.stored_format))

    @property
    def has_chunks(self) -> bool:
        """Whether the values are in chunk files, which have no stamps of their own; always False for a model."""
        return False

    @property
    def is_pipeline(self) -> bool:
        """Whether it consists only of components, as a diffusers pipeline does."""
        return self.settings_file in LISTS

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of its components."""
        return tuple(component.folder for component in self.components)

    def with_components(self, parts: Mapping[str, TensorIndex]) -> TensorIndex:
        """Return the model with the tensors of some of its folders included as ``FOLDER/name``."""
        tensors = dict(self.tensors)
        for folder, part in parts.items():
            tensors |= {f"{folder}/{name}": ref for name, ref in part.items()}
        stamps = (*self.stamps, *(stamp for part in parts.values() for stamp in part.stamps))
        return replace(
            self,
            tensors=tensors,
            stamps=tuple(sorted(stamps, key=lambda stamp: stamp.path)),
            unlisted=(
                *self.unlisted,
                *(f"{folder}/{name}" for folder, part in parts.items() for name in part.unlisted),
            ),
            notes=(
                *self.notes,
                *(f"{folder}/: {note}" for folder, part in parts.items() for note in part.notes),
            ),
            components=tuple(
                Component(
                    folder, part.config, frozenset(os.path.basename(stamp.path) for stamp in part.stamps)
                )
                for folder, part in parts.items()
            ),
        )

    def stored(self) -> dict[str, TensorRef]:
        """Return the tensors of a model whose tensors are all plain ranges of files.

        Raises
        ------
        ModelError
            If an adapter changes some, or the elements of some are not contiguous.
        """
        if self.adapter is not None:
            raise ModelError(f"{place(self.reference)}: a model with an adapter cannot serve here")
        return {name: contiguous(ref) for name, ref in self.tensors.items()}


def open_model(reference: str | os.PathLike[str], *, cache: Path | None = None) -> TensorIndex:
    """Read the headers of a model, without reading tensors; the network is used only for a URL.

    Parameters
    ----------
    reference
        A directory, a ``.safetensors`` file, a file of ``torch.save``, or (if there is no such directory) ``org/name``,
        ``name`` or ``org/name@revision`` in the local Hugging Face cache; a URL of an object store
        (``s3://bucket/model``); and ``model+adapter``, two of these joined.
    cache
        Directory of that cache; default: the environment's.

    Raises
    ------
    ModelError
        If the model is missing, malformed, or of an unsupported kind.
    WorldError
        If the machine cannot read it.
    """
    reference = os.fspath(reference)
    cache = cache_directory() if cache is None else cache
    if "+" in reference and not exists(os.path.expanduser(reference)):
        return _open_adapted(reference, cache)
    volumes.forget(reference)
    path = locate_in(reference, cache)
    if volumes.isdir(path):
        return (
            _read_pipeline(reference, path)
            if is_pipeline(path)
            else _read_model(reference, path, find_shards(path))
        )
    if not path.name.endswith(suffixes()):
        raise bad(
            str(path), no_model([path.name], f"neither a model directory nor a {SUFFIX} or PyTorch file")
        )
    return _read_model(reference, path.parent, Shards((path.name,), None))


def _open_adapted(reference: str, cache: Path) -> TensorIndex:
    """Return a model whose tensors get a LoRA adapter applied as they are read."""

    def exists(part: str) -> bool:
        try:
            locate_in(part, cache)
        except ModelError:
            return False
        return True

    model, place = split_reference(reference, exists)
    return with_adapter(reference, open_model(model, cache=cache), place, cache=cache)


def with_adapter(reference: str, base: TensorIndex, place: str, *, cache: Path | None = None) -> TensorIndex:
    """Return a model whose tensors get a LoRA adapter applied as they are read.

    Parameters
    ----------
    reference
        The reference of model and adapter together.
    place
        The adapter: a directory or a name in the cache.

    Raises
    ------
    ModelError
        If the adapter is missing, malformed, or does not fit the model.
    """
    cache = cache_directory() if cache is None else cache
    model = base.reference
    if base.adapter is not None:
        raise bad(
            reference,
            "adapters cannot be stacked: merge base and first adapter by a passthrough, then put the second on the result",
        )
    if base.quantization is not None:
        what = f"{model} is quantised ({base.quantization.format}), and an adapter goes on float weights"
        raise bad(reference, f"{what}: dequantise it first, or name the weights that it was quantised from")
    volumes.forget(place)
    directory = locate_in(place, cache)
    if volumes.isfile(directory) and volumes.lexists(directory.parent / ADAPTER_CONFIG):
        raise bad(str(directory), "a file of an adapter: give the adapter's directory")
    if is_image_adapter(directory):
        adapter = read_image_adapter(directory, base, model)
    elif base.is_pipeline:
        what = "an adapter in PEFT's format goes on one component"
        raise bad(
            str(directory), f"{what}: write PIPELINE/unet+ADAPTER, and put the result in the pipeline's place"
        )
    elif volumes.lexists(directory / ADAPTER_CONFIG):
        adapter = read_adapter(directory)
    else:
        raise bad(str(directory), f"no adapter here: no {ADAPTER_CONFIG}")
    adapted = adapt(adapter, base, base.config, model)
    return replace(
        base,
        reference=reference,
        tensors=adapted.tensors,
        stamps=(*base.stamps, *adapter.stamps),
        adapter=adapter,
        config=adapted.config,
        notes=(*base.notes, *adapted.notes),
    )


def _read_pipeline(reference: str, directory: Path) -> TensorIndex:
    """Return all components of a pipeline as one model."""
    pipeline = read_pipeline(directory)
    parts = {}
    for folder in pipeline.folders:
        place = directory / folder
        parts[folder] = part = _read_model(reference, place, find_shards(place))
        if part.quantization is not None:
            what = f"this component is quantised ({part.quantization.format}), which is not merged within a pipeline"
            raise bad(str(place), f"{what}: put the component as it was before quantisation in its place")
    whole = TensorIndex(
        reference,
        directory,
        (),
        {},
        config=pipeline.settings,
        notes=pipeline.notes,
        settings_file=pipeline.list_name,
    )
    return whole.with_components(parts)


def _read_model(reference: str, directory: Path, shards: Shards) -> TensorIndex:
    stamps: list[FileStamp] = []
    tensors: dict[str, SourceRef] = {}
    left_out: dict[str, SourceRef] = {}
    notes = list(shards.notes)
    weight_map = shards.weight_map
    metadata: Mapping[str, str] = {}
    for shard in shards.names:
        contents = open_file(directory / shard)
        notes += _beside(directory / shard, contents)
        stamps += [contents.stamp, *contents.more_stamps]
        metadata = contents.metadata
        for name, ref in contents.refs.items():
            if weight_map is not None and weight_map.get(name) != shard:
                left_out[name] = ref
            elif name in tensors:
                raise bad(ref.path, f"tensor {quoted(name)} is in {_file(tensors[name])} too")
            else:
                tensors[name] = ref
    lost: list[tuple[str, str]] = []
    for name, shard in (weight_map or {}).items():
        if name not in tensors:
            where = f", but in {_file(left_out[name])}" if name in left_out else ""
            what = f"tensor {quoted(name)} is not in its shard {quoted(shard)}{where}"
            lost.append((name, what))
    notes += _tied_copies(lost, tensors, directory, shards)
    unlisted = tuple(name for name in left_out if name not in tensors)
    config = _read_config(directory / CONFIG_NAME)
    beside = volumes.lexists(directory / DECLARED_BESIDE)
    found = decoded(
        tensors, declaration_of(config, _read_config(directory / DECLARED_BESIDE) if beside else None)
    )
    scaled = any(ref.dtype in FLOATS8 for ref in found.coded.values())
    quantization = quantization_of(found.tensors, config, beside or scaled)
    return TensorIndex(
        reference,
        directory,
        tuple(stamps),
        with_floats(found.tensors, quantization),
        unlisted,
        config,
        notes=tuple(notes),
        quantization=quantization,
        metadata=metadata if len(shards.names) == 1 else {},
        activations=found.activations,
        coded=found.coded,
    )


def _tied_copies(
    lost: list[tuple[str, str]], tensors: Mapping[str, SourceRef], directory: Path, shards: Shards
) -> list[str]:
    """Return the notes on tensors that only the index lists and that copy other tensors; refuse one that is lost."""
    config = _read_config(directory / CONFIG_NAME) if lost else {}
    for name, what in lost:
        if not is_tied_copy(name, tensors, config):
            raise bad(str(directory / shards.index), f"weight_map: {what}: download or copy the model again")
    if not lost:
        return []
    names = ", ".join(quoted(name, 80) for name, _ in lost[:3]) + (" …" if len(lost) > 3 else "")
    return [
        f"{quoted(shards.index)} lists {names}, which no shard has: left out, as tied copies of other tensors"
    ]


def _beside(path: Path, file: Contents) -> list[str]:
    """Return the notes on entries of a file that are not weights."""
    if not file.left_out:
        return []
    first = sorted(file.left_out, key=lambda name: "optim" not in name)[:4]
    names = ", ".join(quoted(name, 40) for name in first)
    more = f" and {len(file.left_out) - 4} more" if len(file.left_out) > 4 else ""
    return [f"{quoted(path.name)} holds {printable(names)}{more} beside the weights, which are left out"]


def _read_config(path: Path) -> dict[str, Any]:
    """Return a model's settings, which may contain infinities (Mamba writes them)."""
    return read_object(str(path)) if volumes.lexists(path) else {}


def _file(ref: SourceRef) -> str:
    return quoted(os.path.basename(ref.path))
