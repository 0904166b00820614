"""A process that is handed its units by a scheduler, on lines of text."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from streammerge.api import merge
from streammerge.engine import taking
from streammerge.engine.taking import Claiming, HandedOut
from streammerge.output.joining import SHARD
from streammerge.output.shared_ledger import SharedLedger
from tests.conftest import config_for, output_bytes, write_model


@pytest.mark.parametrize("parameters", [{}, {"trim_scope": "model"}])
def test_a_scheduler_that_names_units_gives_the_bytes_of_one_process(
    parameters: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taking.os, "kill", lambda *_: None)  # the end of the lines would stop this process
    tensors = {f"layers.{i}.w": torch.arange(8.0) + i for i in range(3)}
    paths = [write_model(tmp_path / name, tensors) for name in ("base", "a", "b")]
    config = config_for("ties", paths, parameters={"density": 0.5, **parameters})
    merge(config, tmp_path / "alone", shard_size=32, progress=False)
    ours, theirs = os.pipe(), os.pipe()
    with (
        os.fdopen(ours[0]) as lines,
        os.fdopen(ours[1], "w", 1) as scheduler,
        os.fdopen(theirs[0]) as heard,
        os.fdopen(theirs[1], "w") as told,
    ):
        recorded: list[str] = []

        def schedule() -> None:
            for line in heard:
                event = json.loads(line) if line.strip() else {}
                if event.get("event") == "recorded":
                    recorded.append(event["unit"])
                if event.get("event") == "offer":
                    print("0123456789abcdef/nothing", file=scheduler)  # declined
                    print(event["units"][-1], file=scheduler)

        thread = threading.Thread(target=schedule)
        thread.start()
        merge(config, tmp_path / "out", join=HandedOut(lines, told), shard_size=32, progress=False)
        told.close()
        thread.join()
        scheduler.close()
    assert output_bytes(tmp_path / "out") == output_bytes(tmp_path / "alone")
    shards = [unit.partition("/")[2] for unit in recorded if "merge-" in unit]
    assert sorted(shards) == [f"merge-{i:05d}" for i in range(3)]
    assert recorded[-1].endswith("/commit")


@pytest.mark.parametrize(("processes", "most"), [(1, 2), (9, 0)])
def test_a_process_takes_few_shards_ahead_and_the_last_ones_with_nothing_in_hand(
    processes: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    class Noting(Claiming):
        """Notes how many shards are in hand when one more is taken."""

        def take(self, ledger: SharedLedger, units: Sequence[str]) -> str | None:
            before = len(ledger.in_hand)
            unit = super().take(ledger, units)
            if unit is not None and unit.startswith(SHARD):
                held.append(before)
            return unit

    monkeypatch.setattr(SharedLedger, "workers", lambda self: processes)
    tensors = {f"layers.{i}.w": torch.arange(8.0) + i for i in range(8)}
    paths = [write_model(tmp_path / name, tensors) for name in ("base", "a")]
    config = config_for("linear", paths)
    merge(config, tmp_path / "out", join=Noting(), shard_size=32, threads=1, progress=False)
    assert len(held) == 8
    assert max(held) <= most


class _Seized:
    run = "0123456789abcdef"

    def seize(self, unit: str) -> None:
        """Claim nothing."""


def test_what_is_given_up_is_told_so_that_the_scheduler_hands_it_out_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An upload that broke off; what is recorded is not given up."""
    monkeypatch.setattr(taking.os, "kill", lambda *_: None)
    told, ledger = io.StringIO(), cast(SharedLedger, _Seized())
    handed = HandedOut(io.StringIO("".join(f"{ledger.run}/merge-{i}\n" for i in range(2))), told)
    units = ["merge-0", "merge-1"]
    for unit in units:
        while handed.take(ledger, units) != unit:
            assert handed.pause(1.0, threading.Event())
    handed.recorded(ledger, units[0])
    handed.given_up()
    handed.given_up()
    events = [json.loads(line) for line in told.getvalue().splitlines() if line]
    assert [event["unit"] for event in events if event["event"] == "declined"] == [f"{ledger.run}/merge-1"]
