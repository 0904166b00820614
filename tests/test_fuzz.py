"""What the fuzzer starts from keeps its rules, and so does everything it has ever found."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import fuzz

FOUND: list[tuple[str, str, bytes]] = [
    # Characters that turn a line's direction or do not show went to the terminal as they were.
    ("config", "a key with an invisible character", "merge_method: ties\nmodels:\n- {model: a, \u070fpar: 1}".encode()),
    # Whoever seals it right may leave out anything.
    ("manifest", "no files", b'\xff{\n "format les": {},'),
    ("manifest", "files that are a list", b'\xff{\n "files": [],'),
    ("manifest", "a file outside", b'\xff{\n "files": {"../x": {"nbytes": 1}},'),
    (
        "fisher", "an unhashable dtype",
        json.dumps({"zarr_format": 3, "attributes": {"streammerge_fisher": {
            "format": 1, "tensors": {"w": {"array": "w", "dtype": [1, 3]}}}}}).encode(),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("target", "what", "raw"), FOUND, ids=[what for _, what, _ in FOUND])
def test_what_was_found_is_found_no_more(target: str, what: str, raw: bytes, tmp_path: Path) -> None:
    fuzz.TARGETS[target](raw, tmp_path)


@pytest.mark.parametrize("target", sorted(fuzz.TARGETS))
def test_the_seeds_and_their_neighbours_keep_the_rules(target: str, tmp_path: Path) -> None:
    draw = random.Random(target)
    for raw in fuzz.seeds(target):
        fuzz.TARGETS[target](raw, tmp_path)
        for _ in range(20):
            at = draw.randrange(len(raw) + 1)
            changed = raw[:at] + draw.randbytes(draw.randrange(3)) + raw[at + draw.randrange(3) :]
            fuzz.TARGETS[target](changed, tmp_path)


def test_a_broken_rule_is_noticed() -> None:
    with pytest.raises(AssertionError), fuzz.refused_in_one_line(ValueError):
        raise ValueError("two\nlines")
    with pytest.raises(KeyError), fuzz.refused_in_one_line(ValueError):
        raise KeyError("another kind")
