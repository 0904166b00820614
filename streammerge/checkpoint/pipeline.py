"""Models that consist only of folders: diffusers pipelines, and models of sentence-transformers without weights of their own.

Each entry ``name: [library, class]`` of a pipeline's ``model_index.json`` is a component in the folder of that name.
``modules.json`` lists the modules of a model of sentence-transformers: its transformer has a folder too where an older
version saved it (``0_Transformer``), where it is a static embedding, and in the branches of a router. Components with
weights are merged; the others (scheduler, tokenizer, feature extractor, pooling) are copied as files. A listed component
must exist within the pipeline's folder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from streammerge.checkpoint.sidecar_names import is_sound_name, is_weights
from streammerge.checkpoint.sidecars import MODULES, leads_inside, modules_of
from streammerge.checkpoint.weight_names import PIPELINE
from streammerge.checkpoint.weight_sets import find_sets, no_model
from streammerge.io import volumes
from streammerge.io.files import bad, from_os, quoted
from streammerge.io.strict_json import read_object
from streammerge.records import dataclass

_DISPENSABLE = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that pipelines can run without, so that people delete them."""
_WITHOUT_WEIGHTS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "ProcessorFast", "Extractor")
"""Name endings of classes that have settings but no weights."""


_WITH_WEIGHTS = (
    "Transformer",
    "StaticEmbedding",
    "Dense",
    "LayerNorm",
    "CLIPModel",
    "SpladePooling",
    "SparseAutoEncoder",
)
"""Classes of modules of sentence-transformers that have weights."""
LISTS = (PIPELINE, MODULES)
"""The files that list the components."""


@dataclass(frozen=True)
class Pipeline:
    """The declared components of a pipeline."""

    settings: Mapping[str, Any]
    """The content of ``model_index.json``."""
    folders: tuple[str, ...]
    """The folders of components with weights, in the order of the list."""
    notes: tuple[str, ...]
    list_name: str = PIPELINE
    """The file that lists them."""


def is_pipeline(directory: Path) -> bool:
    """Return whether a directory is a pipeline rather than a single model."""
    return volumes.lexists(directory / PIPELINE) or _is_of_modules(directory)


def _is_of_modules(directory: Path) -> bool:
    """Return whether a model of sentence-transformers has weights in the folders of its modules alone."""
    if not volumes.lexists(directory / MODULES):
        return False
    return not find_sets(_listed_in(directory)) and any(
        find_sets(_listed_in(directory / folder))
        for folder in modules_of(directory)
        if volumes.isdir(directory / folder)
    )


def _listed_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(volumes.listdir(folder))
    except OSError as error:
        raise from_os(str(folder), error) from error


def read_pipeline(directory: Path) -> Pipeline:
    """Return the components of a pipeline, without reading weights.

    Raises
    ------
    ModelError
        If a component is missing, lacks its weights, or leads outside the folder.
    """
    path = directory / PIPELINE
    if not volumes.lexists(path):
        return _read_modules(directory)
    _check_inside(directory, path)
    settings = read_object(str(path), "finite")
    folders, notes = [], []
    for name, kind in _listed(settings):
        if not is_sound_name(name) or name.startswith("."):
            raise bad(str(path), f"the component {quoted(name)} is not a plain folder name")
        folder = directory / name
        if not volumes.lexists(folder) and name in _DISPENSABLE:
            notes.append(
                f"{PIPELINE} lists {name}, which is not here; load the output with `{name}=None` as you do this pipeline"
            )
        elif _has_weights(directory, folder, kind):
            folders.append(name)
    if not folders:
        raise bad(
            str(directory),
            "a pipeline of diffusers without any weights: download or copy the pipeline again",
        )
    return Pipeline(settings, tuple(folders), tuple(notes))


def _read_modules(directory: Path) -> Pipeline:
    """Return the modules of a model of sentence-transformers that has weights in their folders alone."""
    _check_inside(directory, directory / MODULES)
    modules = modules_of(directory)
    folders = [
        name for name, kind in modules.items() if _has_weights(directory, directory / name, kind, MODULES)
    ]
    return Pipeline({}, tuple(folders), (), MODULES)


def _listed(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and class of each component; skip ``[null, null]``, which marks an unused component."""
    for name, value in settings.items():
        pair = value if isinstance(value, list) and len(value) == 2 and not name.startswith("_") else ()
        if pair and all(isinstance(part, str) for part in pair):
            yield name, pair[1]


def _has_weights(directory: Path, folder: Path, kind: str, list_name: str = PIPELINE) -> bool:
    """Return whether a component has weights; refuse one that is missing or incomplete."""
    if list_name == MODULES and not volumes.lexists(folder) and kind not in _WITH_WEIGHTS:
        return False  # Folders without any files are lost on the hub.
    if not volumes.isdir(folder):
        state = "is not a folder" if volumes.lexists(folder) else "is missing"
        raise bad(
            str(directory / list_name),
            f"the component {quoted(folder.name)} ({quoted(kind, 60)}) {state}: download or copy the pipeline again",
        )
    _check_inside(directory, folder)
    present = _listed_in(folder)
    if find_sets(present):
        for name in sorted(present):
            if is_weights(name) or name.endswith(".json"):
                _check_inside(directory, folder / name)
        return True
    emptied = kind in _WITH_WEIGHTS if list_name == MODULES else _is_emptied(present, kind)
    if any(map(is_weights, present)) or emptied:
        raise bad(
            str(folder),
            no_model(
                present,
                f"no weights of the component {quoted(kind, 60)} here: download or copy the pipeline again",
            ),
        )
    return False


def _is_emptied(present: Collection[str], kind: str) -> bool:
    """Return whether a folder has the settings of a model but not its weights."""
    return "config.json" in present and not kind.endswith(_WITHOUT_WEIGHTS)


def _check_inside(directory: Path, path: Path) -> None:
    """Refuse a link out of the pipeline's folder, because the files next to the weights are copied to the output."""
    try:
        inside = leads_inside(directory, path)
    except OSError as error:
        raise from_os(str(path), error) from error
    if not inside:
        raise bad(str(path), "a link that leads out of the pipeline's folder: put a copy in its place")
