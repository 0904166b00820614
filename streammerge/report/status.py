"""The state of a merge as text and as plain values."""

from __future__ import annotations

from typing import Any

from streammerge.errors import printable
from streammerge.output.status import AtWork, Status
from streammerge.units import format_seconds, format_share, format_size, plural

_STAGES = {
    "statistics": "statistics of the whole model",
    "shards": "merging",
    "commit": "finishing",
    "": "merging",
}
_NOBODY = "nobody works on it: run the same command again to go on"


def status_values(status: Status) -> dict[str, Any]:
    """Return a status as plain values."""
    return {
        "out": status.out,
        "finished": status.finished,
        "shared": status.shared,
        "stage": status.stage,
        "shards": status.shards,
        "shards_done": status.shards_done,
        "bytes": status.nbytes,
        "bytes_done": status.nbytes_done,
        "failure": status.failure,
        "workers": [
            {
                "host": one.sign.host,
                "pid": one.sign.pid,
                "alive": one.is_alive,
                "seconds_since": round(one.sign.age, 1),
                "units": list(one.units),
                "bytes_read": _number(one, "bytes_read"),
                "bytes_written": _number(one, "bytes_written"),
            }
            for one in status.workers
        ],
    }


def status_text(status: Status) -> str:
    """Return a status as lines: how far it is, then a line a process."""
    out = printable(status.out)
    if status.finished:
        return f"{out}: finished"
    alive = sum(one.is_alive for one in status.workers)
    who = plural(alive, "process", "processes") if alive else _NOBODY
    if status.shared:
        share = format_share(status.nbytes_done, status.nbytes)
        far = (
            f"{_STAGES[status.stage]} · {status.shards_done} of {status.shards} shards done ({share}) · {who}"
        )
    else:
        far = f"merging alone · {who}"
    lines = [f"{out}: {far}"]
    if status.failure:
        lines.append(f"  stopped: {printable(status.failure, 1000)}")
    return "\n".join([*lines, *(f"  {_line(one, status.shared)}" for one in status.workers)])


def _line(one: AtWork, shared: bool) -> str:
    name = f"{printable(one.sign.host, 60)} ({one.sign.pid})"
    if one.sign.has_ended:
        return f"{name}: has ended without finishing"
    if not one.sign.is_fresh:
        return f"{name}: no sign of life for {format_seconds(one.sign.age)}"
    units = ", ".join(printable(unit, 40) for unit in one.units[:3]) or ("waits" if shared else "works")
    read, written = (format_size(_number(one, key)) for key in ("bytes_read", "bytes_written"))
    return f"{name}: {units} · read {read}, wrote {written}"


def _number(one: AtWork, key: str) -> int:
    value = one.sign.progress.get(key, 0)
    return value if isinstance(value, int) and value >= 0 else 0
