"""What a sweep has done: one small file, replaced as a whole whenever a point is finished, scored or removed.

::

    OUT/
      sweep.json                   the record
      sweep.csv                    the same as a table: values, score, seconds, reason
      lambda=0.3,density=0.1/      a point: the output of one merge
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from streammerge.errors import ModelError, OutputError, WorldError, printable
from streammerge.io.durable import PARTIAL, fsync_directory, world_errors, write_file
from streammerge.io.strict_json import parse_object
from streammerge.records import dataclass
from streammerge.version import __version__

RECORD, TABLE, PAGE = "sweep.json", "sweep.csv", "sweep.html"
SCORE, SECONDS, REASON = "score", "seconds", "reason"
_FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One point."""

    values: tuple[tuple[str, str], ...]
    """Each swept parameter with its value as the config spells it."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """What its output depends on; see `streammerge.output.identity`."""
    score: float | None = None
    seconds: float | None = None
    """Seconds of merging, as its share of a batch, and of scoring; None until it is merged."""
    reason: str = ""
    """Why it has no score."""
    removed: bool = False
    """Whether its directory is removed, since others are better."""


@dataclass
class SweepRecord:
    """The record of a sweep in its directory."""

    out: Path
    command: str | None
    rows: dict[str, Row] = field(default_factory=dict)
    """By the name of the point's directory, in the order of the grid."""

    def save(self) -> None:
        """Write the record, then the table, durably."""
        value = {
            "format": _FORMAT,
            "streammerge": __version__,
            "command": self.command,
            "points": {
                name: {
                    "values": [list(pair) for pair in row.values],
                    "identity": dict(row.identity),
                    "score": row.score,
                    "seconds": row.seconds,
                    "reason": row.reason,
                    "removed": row.removed,
                }
                for name, row in self.rows.items()
            },
        }
        write_file(self.out / RECORD, json.dumps(value, indent=1).encode() + b"\n")
        write_file(self.out / TABLE, table_of(list(self.rows.values())).encode())
        with world_errors(self.out):
            fsync_directory(self.out)

    def note(self, name: str, **changes: Any) -> None:
        """Change one row; `save` makes it durable."""
        self.rows[name] = replace(self.rows[name], **changes)

    @property
    def best(self) -> str | None:
        """The first point with the highest score; None without any."""
        scored = [
            (row.score, -i, name) for i, (name, row) in enumerate(self.rows.items()) if row.score is not None
        ]
        return max(scored)[2] if scored else None


def table_of(rows: Sequence[Row]) -> str:
    """Return sweep.csv."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(key for key, _ in rows[0].values), SCORE, SECONDS, REASON])
    for cells in map(cells_of, rows):
        writer.writerow(cells.values())
    return text.getvalue()


def cells_of(row: Row) -> dict[str, str]:
    """Return a row's cells by column, as text; what is not known is empty."""
    return {
        **dict(row.values),
        SCORE: "" if row.score is None else repr(row.score),
        SECONDS: "" if row.seconds is None else f"{row.seconds:.3f}",
        REASON: row.reason or ("removed" if row.removed else ""),
    }


def read_record(out: Path) -> SweepRecord | None:
    """Return the record of a directory; None if it is new or empty.

    Raises
    ------
    OutputError
        If the directory holds something else, or a damaged record.
    """
    path = out / RECORD
    with world_errors(out):
        names = set(os.listdir(out)) if out.is_dir() else set()
    if foreign := sorted(names - {RECORD + PARTIAL}) if RECORD not in names else []:
        raise OutputError(
            f"{printable(out)}: contains files that no sweep wrote ({printable(foreign[0])}): choose an empty or new directory"
        )
    if RECORD not in names:
        return None
    with world_errors(path):
        data = path.read_bytes()
    try:
        value = parse_object(data, str(path), "the record", "any")
        rows = {_directory(name): _row_of(one) for name, one in value["points"].items()}
        command = value["command"]
        if value["format"] != _FORMAT or not (command is None or isinstance(command, str)):
            raise ValueError
    except (ModelError, ValueError, KeyError, TypeError, AttributeError):
        raise OutputError(
            f"{printable(path)}: is not the record of a sweep: choose a different OUT, or remove this directory"
        ) from None
    return SweepRecord(out, command, rows)


def _directory(name: str) -> str:
    """Return the name of a directory in OUT, and of nothing else."""
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise ValueError
    return name


def _row_of(value: Any) -> Row:
    values = tuple((str(key), str(text)) for key, text in value["values"])
    identity = {str(key): str(text) for key, text in value["identity"].items()}
    score, seconds = (_finite(value[key]) for key in (SCORE, SECONDS))
    return Row(values, identity, score, seconds, str(value[REASON]), value["removed"] is True)


def _finite(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def remove_tree(path: Path) -> None:
    """Remove the directory of a point with everything in it; a link is not followed.

    Raises
    ------
    WorldError
        If that fails; the same command goes on from there.
    """
    import shutil

    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise WorldError(
            f"{printable(path)}: is not the directory of a point: move it away and run the same command again"
        )
    with world_errors(path):
        shutil.rmtree(path)
        fsync_directory(path.parent)
