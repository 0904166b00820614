"""An import that is interrupted goes on, and ends in the same bytes."""

from __future__ import annotations

import json
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

_FORKS = """
# Runs the command in forks of one warm process, each killed at some call that changes the file system; prints the codes.
import json, os, signal, sys
import zarr
import streammerge.cli.estimating, streammerge.estimate.fisher.importing
from streammerge.formats import zarr_writer as store
from streammerge.cli import main
store.CHUNK_ELEMENTS = 5000

def trap(name, kill_at, calls):
    real = getattr(os, name)
    def call(*arguments, **keywords):
        calls.append(name)
        if len(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    setattr(os, name, call)

for line in sys.stdin:
    kill_at, arguments = json.loads(line)
    sys.stdout.flush()
    child = os.fork()
    if not child:
        calls = []
        for name in ("fsync", "replace", "rename"):
            trap(name, kill_at, calls)
        sys.argv = ["streammerge", *arguments]
        try:
            main()
        except SystemExit as stop:
            os._exit(stop.code or 0)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_killed_import_goes_on_and_ends_in_the_same_bytes(paths: list[Path], tmp_path: Path) -> None:
    source, out = write_fisher(paths[1]), tmp_path / "s.zarr"
    forks = subprocess.Popen(
        [sys.executable, "-c", _FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert forks.stdin is not None
    assert forks.stdout is not None

    def run(kill_at: int, *options: str) -> int:
        arguments = ["fisher", "import", str(paths[1]), str(source), "--out", str(out), "--quiet", *options]
        print(json.dumps([kill_at, arguments]), file=forks.stdin, flush=True)
        return int(forks.stdout.readline())

    with forks:
        assert run(0) == 0
        expected = tree(out)
        assert run(0) == 2  # exists already
        assert run(0, "--overwrite") == 0
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
            assert run(0) == 0
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
