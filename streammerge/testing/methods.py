"""`check_method`: check the laws of methods for one method, or for every method of a file."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from streammerge.methods.catalog import load_builtin, load_file
from streammerge.methods.registry import Method, all_methods, get_method
from streammerge.testing import laws
from streammerge.testing.models import SHAPES, config_for, write_models
from streammerge.testing.trial import Trial

DTYPES = ("bfloat16", "float32")
_LARGE: dict[str, tuple[int, ...]] = {"large.weight": (2048, 2048), "norm.weight": (2048,)}


def check_method(
    method: str | Path,
    parameters: Mapping[str, Any] | None = None,
    *,
    n_models: int = 3,
    dtypes: Sequence[str] = DTYPES,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    symmetric: bool = False,
    peak: bool = True,
) -> None:
    """Check that a method keeps every promise of a merge. This takes some seconds.

    The output must have the same bytes whatever the memory, the threads, the I/O and the backend, and after an
    interruption. Shapes and dtypes must be kept, plans must pickle, and memory must stay within the plan.

    Parameters
    ----------
    method
        The name of a registered method, or a Python file: every method in it is checked.
    parameters
        As in a config; those without a default must be given.
    n_models
        Number of models to merge without the base, if the method takes as many.
    dtypes
        Torch names of the models' dtypes.
    shapes
        Shapes of the models' tensors, by name.
    symmetric
        Whether the order of the models matters only to rounding.
    peak
        Whether to measure the memory, in a separate process.

    Raises
    ------
    AssertionError
        If a law is broken; the message names the law, the tensor and the cure.
    """
    load_builtin()
    for one, file in _methods_of(method):
        given = {name: value for name, value in (parameters or {}).items() if name in one.parameters}
        with tempfile.TemporaryDirectory() as folder:
            for dtype in dtypes:
                directory = Path(folder) / dtype
                paths = write_models(directory, n_models, getattr(torch, dtype), shapes=shapes)
                config = config_for(one.name, paths, parameters=given, seed=7)
                check_trial(Trial(one, config, directory / "out", file), symmetric=symmetric)
            if peak:
                paths = write_models(Path(folder) / "large", n_models, torch.float32, shapes=_LARGE)
                config = config_for(one.name, paths, parameters=given)
                directory = Path(folder) / "peak"
                directory.mkdir()
                laws.peak_is_within_memory(Trial(one, config, directory, file))


def check_trial(trial: Trial, *, symmetric: bool = False) -> None:
    """Check every law except that of memory for one config."""
    laws.shapes_and_dtypes_are_kept(trial)
    laws.same_bytes_at_any_memory(trial)
    laws.same_bytes_when_interrupted(trial)
    laws.same_bytes_in_torch(trial)
    laws.same_bytes_with_any_threads_of_torch(trial)
    laws.plans_travel(trial)
    if symmetric:
        laws.order_matters_only_to_rounding(trial)


def _methods_of(method: str | Path) -> list[tuple[Method, Path | None]]:
    """Return the methods to check, each with its file."""
    path = Path(method)
    if path.suffix != ".py":
        return [(get_method(str(method)), None)]
    before = dict(all_methods())
    load_file(path)
    found = [one for name, one in all_methods().items() if before.get(name) is not one]
    assert found, f"{path}: it registers no method; decorate a function with @streammerge.method"
    return [(one, path) for one in found]
