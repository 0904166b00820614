"""Find the checkpoints in the directory of a training run: its children that are models, oldest first.

For the Trainer, ``checkpoint-500`` is a checkpoint, but ``runs``, ``training_args.bin`` and a final model next to it
are not. For Lightning, ``epoch=3-step=400.ckpt`` is a checkpoint, but ``last.ckpt`` is not, because it repeats one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from streammerge.checkpoint.shards import find_distributed
from streammerge.checkpoint.weight_names import OUTPUT_MANIFEST, OUTPUT_STATE, PIPELINE
from streammerge.checkpoint.weight_sets import find_sets
from streammerge.formats.registry import suffixes
from streammerge.formats.torch_file import PICKLES
from streammerge.io.files import bad, from_os, quoted
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

_MARKS = (PIPELINE, "adapter_config.json")
"""Files that mark a directory as a model other than a set of weights; opening it gives a precise message."""
_NO_MODEL = late_pattern(r"(optimizer|scheduler|scaler|training_args|rng_state)(_\d+)?", re.ASCII)
"""Stems of PyTorch files in which trainers keep their state."""
_MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class Run:
    """A directory of checkpoints."""

    names: tuple[str, ...]
    """Names of the checkpoints, oldest first."""
    has_model: bool
    """Whether the directory itself holds a model."""
    notes: tuple[str, ...] = ()


def natural(name: str) -> tuple[object, ...]:
    """Return a sort key that orders names by the numbers in them.

    >>> sorted(["checkpoint-1000", "checkpoint-900"], key=natural)
    ['checkpoint-900', 'checkpoint-1000']
    """
    parts = re.split(r"(\d+)", name, flags=re.ASCII)
    return (*(int(part) if i % 2 else part for i, part in enumerate(parts)), name)


def holds_model(directory: Path, present: Collection[str]) -> bool:
    """Return whether a directory looks like a model, sound or not."""
    marked = any(mark in present for mark in _MARKS)
    return marked or bool(find_sets(present)) or bool(find_distributed(directory, present))


def find_run(directory: Path, pattern: str | None = None) -> Run:
    """Return the checkpoints among the children of a directory.

    Parameters
    ----------
    pattern
        A shell pattern for the names. Without it, only names with a number count, if there are any.

    Raises
    ------
    ModelError
        If there are checkpoints of several kinds, and no pattern selects one kind.
    WorldError
        If the machine cannot read it.
    """
    present = _listed(directory)
    names = [name for name in present if not name.startswith(".")]
    if pattern is not None:
        names = [name for name in names if fnmatchcase(name, pattern)]
    folders = [name for name in names if os.path.isdir(directory / name)]
    models = [name for name in folders if holds_model(directory / name, _listed(directory / name))]
    has_model = holds_model(directory, present)
    notes: list[str] = []
    if not models and (pattern is not None or not _is_one_model(present)):
        models = [name for name in names if name not in folders and _is_file_of_model(name)]
    elif pattern is not None:
        notes += _left_out(directory, [name for name in folders if name not in models], "no model in it")
    models, merged = _without_outputs(directory, present, models)
    notes += _left_out(directory, merged, "an output of streammerge")
    if pattern is None:
        models, others = _numbered(directory, models)
        notes += _left_out(directory, others, "no number in its name")
    models, twice = _once(directory, sorted(models, key=natural))
    notes += _left_out(directory, twice, "a link to a checkpoint that is taken")
    return Run(tuple(models), has_model, tuple(notes))


def _listed(directory: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(directory))
    except OSError as error:
        raise from_os(str(directory), error) from error


def _is_one_model(present: Collection[str]) -> bool:
    """Return whether the files of a directory form one model, by libraries' file names, instead of a model each."""
    return any(some.index is not None or some.is_known for some in find_sets(present))


def _is_file_of_model(name: str) -> bool:
    if not name.endswith(suffixes()):
        return False
    if name.endswith(PICKLES):
        return not _NO_MODEL.fullmatch(name.rpartition(".")[0])
    return any(not some.missing and some.index is None for some in find_sets([name]))


def _without_outputs(
    directory: Path, present: Collection[str], names: list[str]
) -> tuple[list[str], list[str]]:
    """Return the names without outputs of merges, and those outputs; if all are outputs, they are what is meant.

    An average that is written next to its checkpoints must not become one of them when the same command runs again.
    """

    def is_output(name: str) -> bool:
        marks = (directory / name / mark for mark in (OUTPUT_MANIFEST, OUTPUT_STATE))
        return f"{name}.json" in present or any(map(os.path.lexists, marks))

    merged = [name for name in names if is_output(name)]
    if len(merged) == len(names):
        return names, []
    return [name for name in names if name not in merged], merged


def _numbered(directory: Path, names: list[str]) -> tuple[list[str], list[str]]:
    """Return the names that have numbers in the common positions, and the names without a number."""
    families: dict[str, str] = {}
    for name in sorted(names, key=natural):
        if family := re.sub(r"\d+", "*", name, flags=re.ASCII):
            families.setdefault(family, name)
    numbered = {family: name for family, name in families.items() if family != name}
    if len(numbered) > 1:
        kinds = ", ".join(quoted(family, 60) for family in list(numbered)[:_MOST_NAMED])
        first = quoted(next(iter(numbered)), 60)
        raise bad(
            str(directory), f"checkpoints of several kinds ({kinds}): say which, as in pattern: {first}"
        )
    if not numbered:
        return names, []
    taken = [name for name in names if re.search(r"\d", name, re.ASCII)]
    return taken, [name for name in names if name not in taken]


def _once(directory: Path, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the distinct names, and the names of links to one of them."""
    real = {name: os.path.realpath(directory / name) for name in names}
    own = {path for name, path in real.items() if not os.path.islink(directory / name)}
    kept: dict[str, str] = {}
    for name, path in real.items():
        if not (os.path.islink(directory / name) and path in own):
            kept.setdefault(path, name)
    return list(kept.values()), [name for name in real if name not in kept.values()]


def _left_out(directory: Path, names: Iterable[str], why: str) -> list[str]:
    some = sorted(names, key=natural)
    if not some:
        return []
    named = ", ".join(quoted(name, 60) for name in some[:_MOST_NAMED])
    more = f" and {len(some) - _MOST_NAMED} more" if len(some) > _MOST_NAMED else ""
    return [f"{quoted(directory.name)}: {named}{more} left out of the average: {why}"]
