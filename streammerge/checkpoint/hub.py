"""Find a model in the local Hugging Face cache, without using the network.

::

    <cache>/models--org--name/refs/main            the hash that `main` stood for when downloaded
    <cache>/models--org--name/snapshots/<hash>/    the files, as links into ../../blobs
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from streammerge.io.files import bad, from_os, quoted, read_exactly, reading
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

_PART = r"[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?"
_NAME = late_pattern(rf"({_PART}(?:/{_PART})?)(?:@([\w.-]+(?:/[\w.-]+)*))?", re.ASCII)
_HASH = late_pattern(r"[0-9A-Za-z_-]{1,64}", re.ASCII)
_PREFIX = late_pattern(r"[0-9a-f]{4,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubName:
    """A model's name on the hub and a revision (default ``main``)."""

    repo: str
    revision: str

    @property
    def cure(self) -> str:
        """The cure for a missing model."""
        return f"download it first with `{self.command}`"

    @property
    def command(self) -> str:
        """The command that downloads the model."""
        revision = "" if self.revision == "main" else f" --revision {self.revision}"
        return f"hf download {self.repo}{revision}"


def parse_name(text: str) -> HubName | None:
    """Parse ``org/name``, ``name`` or ``org/name@revision``; return None for any other text.

    No parsed name can lead outside the cache.

    >>> parse_name("org/name@v1")
    HubName(repo='org/name', revision='v1')
    >>> parse_name("../name"), parse_name("a/b/c")
    (None, None)
    """
    match = _NAME.fullmatch(text) if len(text) <= 400 else None
    if match is None or any(step in match[1] for step in ("--", "..")):
        return None
    revision = match[2] or "main"
    if {".", ".."} & set(revision.split("/")):
        return None
    return HubName(match[1], revision)


def cache_directory() -> Path:
    """Return the cache that `huggingface_hub` would use, by the same environment variables."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]).expanduser() / "hub"
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(shared).expanduser() / "huggingface" / "hub"


def find_snapshot(name: HubName, cache: Path) -> Path | None:
    """Return the snapshot directory of `name`, or None if the repository is not in the cache.

    A revision is a name under ``refs``, a snapshot's hash, or a prefix of a hash.

    Raises
    ------
    ModelError
        If the repository is cached but this revision is not, or is ambiguous.
    """
    repo = cache / ("models--" + name.repo.replace("/", "--"))
    if not os.path.isdir(repo):  # Unlike Path.is_dir it never raises.
        return None
    cached = _listdir(repo / "snapshots")
    ref = repo / "refs" / name.revision
    if os.path.isfile(ref):
        commit = _read_ref(str(ref))
        if commit not in cached:
            raise bad(str(ref), f"its snapshot {quoted(commit)} is not in the cache: {name.cure}")
        return repo / "snapshots" / commit
    if name.revision in cached:
        return repo / "snapshots" / name.revision
    return repo / "snapshots" / _complete(name, repo, cached)


def _complete(name: HubName, repo: Path, cached: list[str]) -> str:
    """Return the one cached hash that begins with the revision."""
    prefix = name.revision
    hits = [commit for commit in cached if commit.startswith(prefix)]
    if not _PREFIX.fullmatch(prefix) or not hits:
        known = ", ".join(commit[:12] for commit in cached[:5]) or "nothing"
        what = f"revision {quoted(prefix)} is not in this cache, which has {known}: {name.cure}"
        raise bad(str(repo), what)
    if len(hits) > 1:
        raise bad(str(repo), f"{len(hits)} snapshots begin with {quoted(prefix)}: write more of it")
    return hits[0]


def _listdir(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise from_os(str(path), error) from error


def _read_ref(path: str) -> str:
    with reading(path) as (fd, status):
        raw = read_exactly(fd, min(status.st_size, 4096), 0, path)
    commit = raw.decode("ascii", "replace").strip()
    if not _HASH.fullmatch(commit):
        raise bad(path, "does not hold the hash of a snapshot")
    return commit
