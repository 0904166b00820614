"""The inputs that the fuzzer starts from, and all that ever broke a promise, are read or refused as promised.

No fuzzer runs here: `tools/fuzz/fuzz.py` does, for as long as one likes.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "fuzz"))

import fuzz_mutate
from fuzz_files import Header, Pickles
from fuzz_outputs import JournalFile
from fuzz_promises import Target, examine, refused
from fuzz_targets import make_targets

from streammerge.output.journal import line_of
from streammerge.output.manifest import seal

NAMES = [
    "header",
    "json",
    "model",
    "reference",
    "pickles",
    "yaml",
    "config",
    "journal",
    "manifest",
    "fisher",
    "chunk",
    "tokenizer",
    "adapter",
    "quantised",
    "size",
]

IDENTITY = line_of({"identity": {"config": "ab"}, "files": {"of base/w": ["00", ""]}})


def store(**fields: object) -> bytes:
    entry = {
        "array": "a",
        "dtype": "F32",
        "shape": [2],
        "chunk": [2],
        "sum": 1,
        "square_sum": 1,
        "largest": 1,
        "zeros": 0,
        "stored_nbytes": 9,
        **fields,
    }
    about = {"format": 1, "tensors": {"w": entry}}
    return json.dumps({"zarr_format": 3, "attributes": {"streammerge_fisher": about}}).encode()


FOUND: list[tuple[str, str, bytes]] = [
    ("header", "a size beside a zero that the reference does not multiply", b'Q\0\0\0\0\0\0\0{"a":{"dtype":"F32",'
     b'"shape":[1099511627776,0,1099511627776],"data_offsets":[0,0]}}    '),
    ("json", "half a surrogate pair in a list", b'\0{"a":["\\ud800"]}'),
    ("json", "half a surrogate pair in a list in a list", b'\2{"a":[[["\\ud800"]]]}'),
    ("yaml", "a mark of no width in a key", "\n.nan\ufeff: 1\n.nan\ufeff: 1".encode()),
    ("config", "a mark of no width in an unknown key", "models:\ufeffl: 1".encode()),
    ("config", "an invisible character", "merge_method: ties\nmodels:\n- {model: a, \u070fpar: 1}".encode()),
    ("journal", "a job before the first", IDENTITY + line_of({"done": [-1, 0, 1, 0, 0, 0]})),
    ("journal", "a fraction", IDENTITY + line_of({"done": [0, 0, 0.5, 0, 0, 0]})),
    ("journal", "a word", IDENTITY + line_of({"done": [0, 0, "1", 0, 0, 0]})),
    ("journal", "letters", IDENTITY + line_of({"done": "0123456"})),
    ("journal", "an end before the start", IDENTITY + line_of({"done": [0, 2, 1, 0, 0, 0]})),
    ("journal", "a checksum of 33 bits", IDENTITY + line_of({"done": [0, 0, 1, 1 << 32, 0, 0]})),
    ("journal", "an identity that is a list", line_of({"identity": ["config"], "files": {}})),
    ("journal", "an identity of numbers", line_of({"identity": {"config": 1}, "files": {}})),
    ("journal", "files that are a list", line_of({"identity": {"config": "ab"}, "files": [["a", "b"]]})),
    ("journal", "a file of one text", IDENTITY + line_of({"files": {"a": ["b"]}})),
    ("journal", "a file of numbers", IDENTITY + line_of({"files": {"a": [1, 2]}})),
    ("journal", "files twice as many", IDENTITY + line_of({"files": {"a": ["b", "c", "d"]}})),
    ("journal", "answers that are a number", IDENTITY + line_of({"answer": ["3", 1]})),
    ("journal", "a threshold of one number", IDENTITY + line_of({"answer": ["3", [[{"threshold": [1]}]]]})),
    ("journal", "a sum that is no number", IDENTITY + line_of({"answer": ["3", [[{"float": "0x1p"}]]]})),
    ("journal", "a sum beyond a float", IDENTITY + line_of({"answer": ["3", [[{"float": "0x1p99999"}]]]})),
    ("journal", "counts that are no numbers", IDENTITY + line_of({"answer": ["3", [[{"touched": [["1"], [2]]}]]]})),
    ("journal", "answers of a job before the first", IDENTITY + line_of({"answer": ["-4", []]})),
    ("journal", "answers of a job at infinity", IDENTITY + line_of({"answer": [float("inf"), []]})),
    ("journal", "an answer of no kind", IDENTITY + line_of({"answer": ["3", [[{}, None]]]})),
    ("manifest", "no files", seal({"a": 1})),
    ("manifest", "files that are a list", seal({"files": [], "identity": {}, "tensors": {}})),
    ("manifest", "a file outside", seal({"files": {"../x": {"nbytes": 1}}, "tensors": {}})),
    ("fisher", "a dtype that is a list", store(dtype=["F32"])),
    ("chunk", "a sound frame around damage", b"\2\1!\4\x90\1\0\0\x90\1\0\0\x18\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff"),
]  # fmt: skip
"""Inputs that once broke a promise: the target, the fault, the input."""


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return make_targets(tmp_path_factory.mktemp("fuzz"))


def test_every_target_is_named_here(targets: dict[str, Target]) -> None:
    assert list(targets) == NAMES


@pytest.mark.parametrize(("name", "what", "raw"), FOUND, ids=[f"{row[0]}: {row[1]}" for row in FOUND])
def test_what_was_found_once_is_refused_as_promised(
    name: str, what: str, raw: bytes, targets: dict[str, Target]
) -> None:
    assert examine(targets[name], raw) is None


@pytest.mark.parametrize("name", NAMES)
def test_seeds_and_a_few_changes_of_them_keep_every_promise(name: str, targets: dict[str, Target]) -> None:
    target, rng = targets[name], random.Random(name)
    seeds = [seed for seed in target.seeds() if len(seed) < 20_000]
    assert len(seeds) > 5

    def blind(raw: bytes) -> bytes:
        at = rng.randrange(len(raw) + 1)
        return raw[:at] + rng.randbytes(rng.randrange(3)) + raw[at + rng.randrange(3) :]

    changed = [blind(seed) for seed in rng.sample(seeds, min(len(seeds), 20))]
    if target.change is not None:
        changed += [target.change(seed, rng, blind) or b"" for seed in rng.choices(seeds, k=60)]
    broken = {what: raw for raw in (*seeds, *changed) if (what := examine(target, raw))}
    # Slowness alone may be the machine's.
    assert not {what: raw for what, raw in broken.items() if not what.startswith("took")}


def promise(check: Callable[[bytes], None]) -> str | None:
    target = Target("x", "x", list, check)
    return examine(target, b"")


def test_a_broken_promise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_two_lines(raw: bytes) -> None:
        refused(ValueError("two\nlines"), ValueError)

    def raise_another(raw: bytes) -> None:
        refused(KeyError("x"), ValueError)

    def take_memory(raw: bytes) -> None:
        held = bytearray(1 << 20)
        held[::4096] = b"x" * 256

    assert "not one printable line" in str(promise(raise_two_lines))
    assert "KeyError" in str(promise(raise_another))
    assert "ZeroDivisionError" in str(promise(lambda raw: print(1 / 0)))
    assert promise(take_memory) is None
    monkeypatch.setattr("fuzz_promises.MAX_GROWTH", -1)
    assert "MiB of memory" in str(promise(take_memory))
    monkeypatch.setattr("fuzz_promises.MAX_SECONDS", -1.0)
    assert "s of CPU time" in str(promise(take_memory))


def test_changed_files_have_their_frames_right_again() -> None:
    rng = random.Random(0)

    def blind(raw: bytes) -> bytes:
        return raw

    header = next(seed for seed in Header.seeds() if b"data_offsets" in seed and len(seed) > 100)
    for _ in range(20):
        changed = fuzz_mutate.header(header, rng, blind)
        assert changed is not None
    lines = fuzz_mutate.journal(JournalFile.seeds()[1], rng, blind)
    assert lines is not None
    assert lines.count(b"\n") > 1
    archive = next(seed for seed in Pickles.seeds() if fuzz_mutate.unzip(seed))
    entries = fuzz_mutate.unzip(archive)
    assert fuzz_mutate.unzip(fuzz_mutate.zipped(entries)) == entries
