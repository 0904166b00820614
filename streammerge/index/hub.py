"""Models that lie in the local Hugging Face cache. Nothing is ever downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from streammerge.errors import ModelError, printable

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", re.ASCII)


def cache_directory() -> Path:
    """Return where huggingface_hub keeps its snapshots: HF_HUB_CACHE, HF_HOME/hub, or the default."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    return Path(home) / "hub"


def snapshot(reference: str, cache: Path | None = None) -> Path:
    """Return the directory of ``org/name`` or ``org/name@revision`` in the local cache.

    Raises
    ------
    ModelError
        If there is no such snapshot; the message says how to fetch it.
    """
    place = cache or cache_directory()
    if not _REPOSITORY.fullmatch(reference) or ".." in reference:
        raise ModelError(f"{printable(reference)}: no such directory")
    name, _, revision = reference.partition("@")
    folder = place / ("models--" + name.replace("/", "--"))
    cure = f"no such directory, and no snapshot of it in {printable(place)}: run `hf download {name}` first"
    if not folder.is_dir():
        raise ModelError(f"{printable(reference)}: {cure}")
    wanted = revision or "main"
    pointer = folder / "refs" / wanted
    if pointer.is_file():
        wanted = pointer.read_text()[:100].strip()
    snapshots = folder / "snapshots"
    found = [p for p in snapshots.glob("*") if p.is_dir() and p.name.startswith(wanted)]
    if len(found) != 1:
        raise ModelError(
            f"{printable(reference)}: revision {printable(revision or 'main')} is not in the cache: {cure}"
        )
    return found[0]
