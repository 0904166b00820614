"""A merge that the version before was interrupted in is continued; the journal is one that it wrote."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streammerge.api import merge
from streammerge.errors import OutputError
from streammerge.io.durable import PARTIAL
from streammerge.output.place import JOURNAL as NAME
from streammerge.output.place import STATE
from tests.conftest import output_bytes

JOURNAL = Path(__file__).with_name("journal_of_the_version_before.jsonl")
"""By ``ties``, in fp32, with --hash-inputs, in buffers of 64 KiB: two tensors and a part of a third are done."""
CONFIG: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "a"}, {"model": "b"}],
    "parameters": {"weight": 0.5, "density": 0.4},
    "dtype": "float32",
}
SHAPE = (64, 96)
N = SHAPE[0] * SHAPE[1]


def write_model(directory: Path, seed: int) -> None:
    """Write a model whose bytes are the same wherever and whenever it is written."""
    directory.mkdir()
    header: dict[str, Any] = {}
    values = []
    for i in range(6):
        mixed = (np.arange(N, dtype=np.int64) * (2654435761 + 977 * seed + 131 * i)) >> 7
        values.append(((mixed % 2001 - 1000).astype(np.float32) / 4096).tobytes())
        places = [4 * N * i, 4 * N * (i + 1)]
        header[f"layers.{i}.weight"] = {"dtype": "F32", "shape": list(SHAPE), "data_offsets": places}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(values))
    (directory / "config.json").write_text('{"model_type": "llama"}')


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an output as the version before left it: its journal, and what that says is done of the one shard."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, seed)
    merge(CONFIG, "whole", hash_inputs=True)
    shard = bytearray((tmp_path / "whole" / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(shard[:8], "little")
    done = bytearray(len(shard) - header)
    for line in JOURNAL.read_text().splitlines():
        if receipt := json.loads(line[9:]).get("done"):
            first, last = (4 * (N * receipt[0] + element) for element in receipt[1:3])
            done[first:last] = shard[header + first : header + last]
    state = tmp_path / "out" / STATE
    state.mkdir(parents=True)
    (state / NAME).write_bytes(JOURNAL.read_bytes())
    (tmp_path / "out" / f"model.safetensors{PARTIAL}").write_bytes(shard[:header] + done)
    return tmp_path / "out"


def test_a_merge_of_the_version_before_is_continued(interrupted: Path) -> None:
    summary = merge(CONFIG, interrupted, hash_inputs=True)
    assert summary.bytes_resumed == sum(
        4 * (receipt[2] - receipt[1])
        for line in JOURNAL.read_text().splitlines()
        if (receipt := json.loads(line[9:]).get("done"))
    )
    assert output_bytes(interrupted) == output_bytes(interrupted.with_name("whole"))


def test_a_different_merge_of_the_version_before_is_refused_by_name(interrupted: Path) -> None:
    with pytest.raises(OutputError, match="unfinished merge with a different config"):
        merge({**CONFIG, "parameters": {"weight": 0.5, "density": 0.5}}, interrupted, hash_inputs=True)


def test_a_merge_of_a_different_version_is_refused_by_name(interrupted: Path) -> None:
    journal = interrupted / STATE / NAME
    first, *rest = journal.read_bytes().splitlines(keepends=True)
    text = first[9:-1].replace(b'"version":"0.1.0"', b'"version":"0.0.9"')
    journal.write_bytes(b"".join([b"%08x %s\n" % (zlib.crc32(text), text), *rest]))
    with pytest.raises(OutputError, match="unfinished merge with a different version"):
        merge(CONFIG, interrupted, hash_inputs=True)
