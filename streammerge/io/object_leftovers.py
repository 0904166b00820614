"""Abort the uploads that dead processes have left in a bucket: their parts are invisible, and billed."""

from __future__ import annotations

from collections.abc import Sequence


def abort_uploads(urls: Sequence[str]) -> int:
    """Abort all unfinished uploads of some objects; return how many there were."""
    return 0
