"""The promises that hold of every input: accepted and read rightly, or refused in one bounded line of our own.

A target's `check` returns quietly where the input was accepted and is read rightly, or refused as promised.
Everything else leaves it as an exception. No fuzzing engine is needed: `examine` runs one input, as the tests do.
"""

from __future__ import annotations

import importlib
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import fuzz_json

from streammerge.errors import StreammergeError

MAX_NBYTES = 1 << 16
"""Longest input."""


MAX_SECONDS = 1.0
"""The most seconds of CPU time that one input may take."""


MAX_GROWTH = 64 << 20
"""Bytes by which one input may raise the peak memory of the process."""


MAX_LINE = 1000
"""Characters of a refusal."""


ROOT = Path(__file__).resolve().parents[2]


class Finding(AssertionError):
    """Something that must hold does not; the message says what."""


def require(holds: bool, otherwise: str) -> None:
    """Raise a `Finding` unless something holds."""
    if not holds:
        raise Finding(otherwise)


def refused(error: Exception, *kinds: type[Exception], limit: int = MAX_LINE) -> str:
    """Return the line of a refusal that is as promised: of a kind that may come, one line, bounded."""
    line = str(error)
    require(type(error) in kinds, f"{type(error).__name__}: {line[:200]!r}")
    require(0 < len(line) <= limit, f"a refusal of {len(line)} characters: {line[:100]!r}")
    require(line.isprintable(), f"a refusal that is not one printable line: {line[:200]!r}")
    return line


@dataclass(frozen=True)
class Target:
    """One reader."""

    name: str
    about: str
    seeds: Callable[[], Iterable[bytes]]
    check: Callable[[bytes], None]
    change: Callable[[bytes, Random, fuzz_json.Blind], bytes | None] | None = None
    """Changes an input so that its frame stays whole."""


def examine(target: Target, raw: bytes) -> str | None:
    """Run one input; return what is wrong, or None."""
    peak, began = _peak(), time.process_time()
    try:
        target.check(raw)
    except StreammergeError as error:
        return f"{type(error).__name__} where none may come: {str(error)[:200]!r}"
    except Finding as finding:
        return str(finding)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]!r} at {_where(error)}"
    seconds, growth = time.process_time() - began, _peak() - peak
    if seconds > MAX_SECONDS:
        return f"took {seconds:.1f} s of CPU time"
    return f"took {growth >> 20} MiB of memory" if growth > MAX_GROWTH else None


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _where(error: Exception) -> str:
    trace = error.__traceback__
    frames = []
    while trace is not None:
        frames.append(f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " ".join(frames[-3:])


def table_of(module: str, name: str) -> list[tuple]:
    """Return a table of one of the test modules."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return getattr(importlib.import_module(f"tests.{module}"), name)


def encoded(rows: Iterable[bytes | str]) -> list[bytes]:
    """Return rows as bytes, without those that are too long for an input."""
    found = (row if isinstance(row, bytes) else row.encode("utf-8", "surrogatepass") for row in rows)
    return [row for row in found if len(row) <= MAX_NBYTES]
