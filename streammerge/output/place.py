"""The paths of an output, and of its working files until it is finished.

An output is a directory, with its working files in it, or one safetensors file. A single file's working files lie in a
directory of their own next to it, so that nothing in its folder changes before the merge is finished, and merges
into one folder do not wait for each other::

    merged/                          models/
      .streammerge/journal.jsonl       merged.safetensors.streammerge/journal.jsonl
      model.safetensors.partial        merged.safetensors.streammerge/merged.safetensors.partial
      model.safetensors                merged.safetensors
      streammerge.json                 merged.safetensors.json
"""

from __future__ import annotations

import re
from pathlib import Path

from streammerge.checkpoint.weight_names import OUTPUT_MANIFEST, OUTPUT_STATE
from streammerge.formats.safetensors import SUFFIX
from streammerge.io import volumes
from streammerge.io.durable import PARTIAL
from streammerge.io.private import private
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

STATE = OUTPUT_STATE
"""Name of the directory of a journal. For a single file, the directory's name is the file's name with this suffix."""
JOURNAL = "journal.jsonl"
WORKERS = "workers"
"""Name of the directory of signs of life in that of the journal."""
RUN = "run.json"
"""Name of the file that says what a shared run is about, in the directory of the run."""
VERIFYING = ".streammerge-verify"
"""Name of the directory that processes share while they verify an output."""
_RUN = late_pattern(r"[0-9a-f]{16}", re.ASCII)
MANIFEST = OUTPUT_MANIFEST
CONFIG_COPY = "streammerge_config.yml"


def is_run(name: str) -> bool:
    """Return whether a name in the directory of a journal is that of a run that several processes share."""
    return _RUN.fullmatch(name) is not None


@dataclass(frozen=True)
class Place:
    """The paths of an output and its working files."""

    out: Path
    """The output as the user names it."""
    folder: Path
    """The directory of its finished files."""
    state: Path
    """The directory of its journal, which exists only until the merge is finished."""
    manifest: Path
    file: str | None = None
    """The name of the single file; None if the output is a directory."""

    @property
    def journal(self) -> Path:
        """The path of the journal."""
        return self.state / JOURNAL

    @property
    def in_state(self) -> tuple[Path, ...]:
        """Every file that may be left in the journal's directory, without the endings of unfinished files."""
        names = (JOURNAL,) if self.file is None else (JOURNAL, self.file, self.manifest.name)
        return tuple(self.state / name for name in names)

    @property
    def is_unfinished(self) -> bool:
        """Whether a merge has begun here that has not ended."""
        whole = self.file is None or volumes.is_url(self.out)
        return volumes.lexists(self.state if whole else self.journal)

    def look_anew(self) -> None:
        """Forget what is known of a store's objects: they are written meanwhile."""
        for path in (self.out, self.manifest):
            volumes.forget(path)

    def path(self, name: str) -> Path:
        """Return the path of a finished file."""
        return self.folder / name

    def partial(self, name: str) -> Path:
        """Return the path of a file until it is finished."""
        return (self.folder if self.file is None else self.state) / (name + PARTIAL)

    def private(self, name: str) -> Path:
        """Return the path of a file that only this process writes, until it is finished."""
        return private(self.partial(name).with_name(Path(name).name))

    def private_in_state(self, name: str) -> Path:
        """Return the path of a working file that only this process writes, until it is finished."""
        return private(self.state / name)

    def paths(self, name: str) -> tuple[Path, ...]:
        """Return both paths of a file: until it is finished, and then."""
        return self.partial(name), self.path(name)


def place_of(out: Path) -> Place:
    """Return the place of an output: a single file if its name ends in ``.safetensors`` and is not that of a directory.

    >>> place_of(Path("models/merged.safetensors")).manifest.name
    'merged.safetensors.json'
    """
    if not out.name.endswith(SUFFIX) or out.name == SUFFIX or volumes.isdir(out):
        return Place(out, out, out / STATE, out / MANIFEST)
    name = out.name
    return Place(out, out.parent, out.with_name(name + STATE), out.with_name(f"{name}.json"), name)
