"""Select the files that are copied to the output in addition to the weights, and name those that are not."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.sidecar_names import QUANTISATION, is_tokenizer_file
from streammerge.checkpoint.sidecars import survey, unreadable
from streammerge.checkpoint.tokenizer import FULL
from streammerge.errors import printable
from streammerge.io import volumes
from streammerge.io.stamp import FileStamp
from streammerge.planning.files.tokenizer import TokenizerFiles
from streammerge.records import dataclass

_SHOWN = 12
"""The most names that a warning lists; the rest are counted."""
_FIXED_VOCABULARY = ("tekken", ".tiktoken")
"""Parts of the names of files of tokenizers to which no token can be added."""


@dataclass(frozen=True)
class Surroundings:
    """The files of an output in addition to its weights."""

    files: Mapping[str, FileStamp] = field(default_factory=dict)
    """The copied files, by their path in the output."""
    notes: tuple[str, ...] = ()


def surroundings(
    template: TensorIndex, tokenizer: Path | None, changed: TokenizerFiles | None, *, quantised: bool
) -> Surroundings:
    """Return the files that an output gets from the folder of the template model, and of the tokenizer's source.

    Parameters
    ----------
    tokenizer
        Folder of the tokenizer's source; None: the output gets none.
    changed
        The tokenizer files that the merge changes.
    quantised
        Whether the output holds quantised weights; the files that declare them are then copied too.

    Raises
    ------
    WorldError
        If the machine cannot read the folder.
    """
    whole = not is_single_file(template)
    own = {os.path.basename(stamp.path) for stamp in template.stamps}
    beside = survey(template.directory, own, whole=whole, merged=template.folders)
    files = dict(beside.files)
    if tokenizer != template.directory:
        files = {name: stamp for name, stamp in files.items() if not is_tokenizer_file(name)}
        if tokenizer is not None:
            others = survey(tokenizer, (), whole=True).files
            files |= {name: stamp for name, stamp in others.items() if is_tokenizer_file(name)}
    left = list(beside.left)
    for name in [name for name in files if _is_untrue(name, changed, quantised=quantised)]:
        del files[name]
        left.append(name)
    settings = template.settings_file
    if volumes.exists(template.directory / settings):  # already read, even through a link out of the folder
        files[settings] = _stamp(template.directory / settings)
        left = [name for name in left if not name.startswith(f"{settings} (")]
    notes = [
        f"{printable(template.reference)}: the weights in {printable(name, 80)}/ are copied, not merged"
        for name in beside.modules
        if name not in template.folders
    ]
    return Surroundings(dict(sorted(files.items())), (*notes, *_left_behind(template, left)))


def is_single_file(index: TensorIndex) -> bool:
    """Return whether a model is a single file, in a folder that may hold other models."""
    reference = index.reference
    cuts = [len(reference), *(i for i, c in enumerate(reference) if c == "+")]
    return any(volumes.isfile(os.path.expanduser(reference[:cut])) for cut in cuts)


def _is_untrue(name: str, changed: TokenizerFiles | None, *, quantised: bool) -> bool:
    """Return whether a file describes the template model, and would be wrong for the output."""
    if name.rpartition("/")[2] in QUANTISATION:
        return not quantised
    grown = changed is not None and FULL in changed.changed
    return grown and "/" not in name and any(part in name for part in _FIXED_VOCABULARY)


def _stamp(path: Path) -> FileStamp:
    try:
        return FileStamp.of(path, volumes.stat(path))
    except OSError as error:
        raise unreadable(path, error) from error


def _left_behind(template: TensorIndex, left: Sequence[str]) -> list[str]:
    """Return a warning that names the files which are not copied."""
    if not left:
        return []
    more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    names = ", ".join(printable(name, 80) for name in left[:_SHOWN])
    return [
        f"{printable(template.reference)}: not copied to the output: {names}{more}; copy by hand what you need"
    ]
