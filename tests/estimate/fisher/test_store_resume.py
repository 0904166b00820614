"""An import that is interrupted goes on, and ends in the same bytes."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streammerge.errors import OutputError
from streammerge.estimate.fisher.importing import import_diagonal
from streammerge.formats import zarr_writer as store
from tests.conftest import write_fisher
from tests.estimate.fisher.stores import (
    tree,
)

# --- interruption

_KILLED = """
import os, signal, sys
from streammerge.formats import zarr_writer as store
store.CHUNK_ELEMENTS = 5000
kill_at, calls = int(sys.argv.pop(1)), 0
def trap(name):
    real = getattr(os, name)
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    setattr(os, name, call)
for name in ("fsync", "replace", "rename"):
    trap(name)
from streammerge.cli import main
main()
"""


@pytest.mark.slow
def test_a_killed_import_goes_on_and_ends_in_the_same_bytes(paths: list[Path], tmp_path: Path) -> None:
    source, out = write_fisher(paths[1]), tmp_path / "s.zarr"

    def run(kill_at: int, *options: str) -> int:
        command = [
            sys.executable,
            "-c",
            _KILLED,
            str(kill_at),
            "fisher",
            "import",
            str(paths[1]),
            str(source),
        ]
        return subprocess.run([*command, "--out", str(out), "--quiet", *options], check=False).returncode

    assert run(10**9) == 0
    expected = tree(out)
    assert run(10**9) == 2  # exists already
    assert run(10**9, "--overwrite") == 0
    assert tree(out) == expected
    shutil.rmtree(out)
    killed = 0
    for kill_at in (1, 2, 3, 9, 20, 34, 55, 30, 10, 5):
        code = run(kill_at)
        killed += code == -signal.SIGKILL
        if code == 0:
            break
        assert not out.exists()
    assert killed >= 6
    if not out.exists():
        assert run(10**9) == 0
    assert tree(out) == expected
    assert list(tmp_path.glob("s.zarr.*")) == []


@pytest.mark.usefixtures("small_chunks")
def test_finished_arrays_are_kept_and_damaged_ones_done_again(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = write_fisher(paths[1])
    import_diagonal(paths[1], source, tmp_path / "whole.zarr")
    real, written = store.StoreWriter.write, []

    def write(self: Any, tensor: str, *arguments: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(tensor)
        real(self, tensor, *arguments)

    monkeypatch.setattr(store.StoreWriter, "write", write)
    with pytest.raises(KeyboardInterrupt):
        import_diagonal(paths[1], source, tmp_path / "s.zarr")
    partial = tmp_path / "s.zarr.partial"
    first = partial / written[0]
    (first / "c" / "0").unlink() if (first / "c" / "0").is_file() else shutil.rmtree(first / "c")
    monkeypatch.setattr(store.StoreWriter, "write", real)
    with pytest.raises(OutputError, match="unfinished store of something else"):
        import_diagonal(paths[1], source, tmp_path / "s.zarr", dtype="BF16")
    with pytest.raises(OutputError, match="something else"):
        import_diagonal(paths[1], source, tmp_path / "s.zarr", about={"seed": 3})
    assert import_diagonal(paths[1], source, tmp_path / "s.zarr").resumed == 2
    assert tree(tmp_path / "s.zarr") == tree(tmp_path / "whole.zarr")


def test_overwrite_replaces_stores_only(paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    with pytest.raises(OutputError, match="no Zarr store"):
        import_diagonal(paths[1], write_fisher(paths[1]), tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "x").read_text() == "x"
