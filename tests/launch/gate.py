"""Given to engines by ``--methods``: no more shards and counts are recorded than the file of ``STREAMMERGE_GATE`` allows."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streammerge.output.shared_ledger import SharedLedger

_record = SharedLedger.record


def record(self: SharedLedger, unit: str, value: Mapping[str, Any]) -> None:
    """Record a unit when the gate lets it through."""
    gate = Path(os.environ["STREAMMERGE_GATE"])
    while len(self.done()) >= int(gate.read_text() or 0):
        time.sleep(0.02)
    _record(self, unit, value)


if "--units-from-stdin" in sys.argv:  # an engine, not the process of the tests
    SharedLedger.record = record  # type: ignore[method-assign]
