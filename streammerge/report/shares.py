"""How well a merge can be shared between processes, as text and as plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from streammerge.planning.share_out import Shares
from streammerge.units import format_seconds, format_size, plural

_BOUNDS = {
    "workers": "bounded by what each process reads and writes: more processes are faster",
    "store": "bounded by the store: more processes are no faster",
    "shards": "bounded by the shards: the last ones keep few processes busy",
}


def shares_values(shares: Shares) -> dict[str, Any]:
    """Return shares as plain values."""
    return {**asdict(shares), "idle": round(shares.idle, 4)}


def shares_text(shares: Shares) -> str:
    """Return a sentence on a merge that is shared between processes."""
    time = "" if shares.seconds is None else f", about {format_seconds(shares.seconds, coarse=True)}"
    cure = (
        ""
        if shares.better is None
        else f"; --shard-size {format_size(shares.better).replace(' ', '')} leaves less idle"
    )
    return (
        f"{plural(shares.workers, 'process', 'processes')}: {plural(shares.shards, 'shard')}, at most {shares.most} each, "
        f"{100 * shares.idle:.0f} % idle at the end{time}; {_BOUNDS[shares.bound]}{cure}"
    )
