"""Components of sentence-transformers models: the modules after the transformer, each in its own folder.

A tensor of such a folder counts as a tensor of the model, with the name ``FOLDER/name``. The output stores it in the
same folder, under its own name. Diffusers pipelines consist only of components: see `streammerge.checkpoint.pipeline`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.sidecar_names import is_weights
from streammerge.checkpoint.sidecars import leads_inside, module_folders
from streammerge.io import volumes


def shared_folders(
    indexes: Sequence[TensorIndex], opening: Callable[[str], TensorIndex]
) -> list[TensorIndex]:
    """Return the models, extended by the tensors of the module folders that all models share.

    A folder is shared if every model has it with the same tensor names and shapes. Any other folder is left out here,
    to be copied from one of the models.

    Parameters
    ----------
    opening
        Opens the weights of one folder.
    """
    if any(index.adapter is not None or index.components for index in indexes):
        return list(indexes)
    folders = [folder for folder in _with_weights(indexes[0].directory) if all(map(_is_directory, indexes))]
    shared: dict[str, list[TensorIndex]] = {}
    for folder in folders:
        if all(folder in _with_weights(index.directory) for index in indexes):
            parts = [opening(str(index.directory / folder)) for index in indexes]
            if len({tuple((name, ref.shape) for name, ref in sorted(part.items())) for part in parts}) == 1:
                shared[folder] = parts
    if not shared:
        return list(indexes)
    return [
        index.with_components({folder: parts[place] for folder, parts in shared.items()})
        for place, index in enumerate(indexes)
    ]


def _is_directory(index: TensorIndex) -> bool:
    """Return whether a model is a whole directory, not one file in a directory that may belong to a different model."""
    return (
        index.directory == volumes.as_path(os.path.expanduser(index.reference))
        or "snapshots" in index.directory.parts
    )


def _with_weights(directory: Path) -> list[str]:
    """Return the module folders that hold weights, without those that a link takes out of the directory."""
    found = []
    for folder in module_folders(directory):
        try:
            names = [name for name in volumes.listdir(directory / folder) if is_weights(name)]
            if names and all(leads_inside(directory, directory / folder / name) for name in names):
                found.append(folder)
        except OSError:
            continue
    return found
