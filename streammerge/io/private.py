"""Temporary names that only one process uses: two hosts that share a directory never write the same unfinished file."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from streammerge.io.durable import PARTIAL
from streammerge.lazy import late_pattern

_PRIVATE = late_pattern(r"(?:\.[0-9a-f]{16})?\.[0-9a-f]{12}\.partial", re.ASCII)
_known: dict[int, str] = {}


def own_token() -> str:
    """Return 12 random hexadecimal digits that name this process; a fork has its own."""
    return _known.setdefault(os.getpid(), secrets.token_hex(6))


def private(path: Path, *more: str) -> Path:
    """Return the temporary path of an unfinished file that only this process uses.

    Parameters
    ----------
    more
        16 hexadecimal digits that name the merge, if several processes share it.
    """
    return path.with_name(".".join((path.name, *more, own_token())) + PARTIAL)


def finished_name(name: str) -> str:
    """Return the name that an unfinished file will have; a finished file has it already.

    >>> finished_name("README.md.0123456789ab.partial"), finished_name("README.md.partial"), finished_name("README.md")
    ('README.md', 'README.md', 'README.md')
    """
    found = _PRIVATE.search(name)
    return name[: found.start()] if found and found.end() == len(name) else name.removesuffix(PARTIAL)


def is_private(name: str) -> bool:
    """Return whether the name is a temporary one of a single process."""
    return _PRIVATE.search(name) is not None and finished_name(name) != name.removesuffix(PARTIAL)
