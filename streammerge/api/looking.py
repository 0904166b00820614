"""List a model's tensors, and the methods."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from streammerge.checkpoint.index import TensorIndex, open_model
from streammerge.methods.catalog import load_builtin, load_file
from streammerge.methods.registry import Method, all_methods


def inspect_model(model: str | os.PathLike[str]) -> TensorIndex:
    """Return a model's tensors from its headers alone: a mapping of names to dtype, shape, file and bytes.

    Parameters
    ----------
    model
        A directory, a ``.safetensors`` or PyTorch file, a name in the Hugging Face cache (``org/name@revision``), or
        ``model+adapter``.

    Returns
    -------
    TensorIndex
        Each value has ``dtype`` (as safetensors writes it), ``shape``, ``n_elements``, ``nbytes`` and ``path``; the
        model itself ``nbytes``, ``config`` (its config.json) and ``metadata``.

    Raises
    ------
    ModelError
        If the model is missing, malformed, or of an unsupported kind.
    WorldError
        If the machine cannot read it.

    Examples
    --------
    >>> index = streammerge.inspect_model("models/llama-base")  # doctest: +SKIP
    >>> index["model.norm.weight"].shape, index.nbytes  # doctest: +SKIP
    ((4096,), 13476839424)
    """
    return open_model(model)


def list_methods(methods: str | os.PathLike[str] | None = None) -> Mapping[str, Method]:
    """Return every merge method by name: those that ship, those of installed packages, and a user's.

    Parameters
    ----------
    methods
        A Python file with methods of your own; it is run.

    Returns
    -------
    Mapping
        Each value has ``summary``, ``text``, ``parameters`` (with defaults, bounds and choices), ``presets``, ``base``,
        ``n_models`` and ``paper``.

    Raises
    ------
    InputError
        If the file, or an installed package, cannot be imported.

    Examples
    --------
    >>> import streammerge
    >>> ties = streammerge.list_methods()["ties"]
    >>> ties.base, ties.parameters["density"].default
    ('required', 1.0)
    """
    load_builtin()
    if methods is not None:
        load_file(Path(methods))
    return all_methods()
