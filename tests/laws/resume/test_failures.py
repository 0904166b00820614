"""A failure at any call of any operation: nothing torn, and run again, the same bytes."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable

import pytest

from streammerge.errors import WorldError
from tests.laws.resume.scene import Scene, SimulatedKill
from tests.laws.resume.traps import Trap, set_trap

ERRORS: dict[str, Callable[[], BaseException]] = {
    "disk full": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "I/O error": lambda: OSError(errno.EIO, "Input/output error"),
    "kill": SimulatedKill,
}
OPERATIONS = [
    "ShardWriter.write",
    "ShardWriter.sync",
    "Journal._append",
    "write_file",
    "ShardWriter.publish",
    "fsync_directory",
]
SYSTEM_CALLS = [
    "fallocate",
    "os.pwrite",
    "os.write",
    "os.fsync",
    "os.fdatasync",
    "os.replace",
    "os.ftruncate",
    "os.unlink",
    "os.rmdir",
    "os.mkdir",
]


@pytest.mark.parametrize("error", list(ERRORS))
@pytest.mark.parametrize("operation", [*OPERATIONS, *SYSTEM_CALLS])
def test_a_failure_at_any_call_of_an_operation_leaves_nothing_torn_and_is_resumed_to_the_same_bytes(
    operation: str, error: str, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the merge with several shards and rounds, a kill at every call, and at each call one error or the other, since
    # both take the same way out; of merges in one shard, a kill at every other call, and few errors.
    step = (1 if error == "kill" else 2) * (1 if scene.case == "ties" else 2)
    first = 1 + (error == "I/O error") * step // 2
    for at in range(first, 200, step):
        out = scene.directory / f"out{at}"
        trap = Trap(ERRORS[error](), at, once=error == "I/O error")
        with monkeypatch.context() as patch:
            set_trap(patch, operation, trap)
            try:
                scene.merge(out)
            except (WorldError, SimulatedKill) as caught:
                right = isinstance(caught, SimulatedKill) == (error == "kill")
                if not right or not trap.sprung:
                    raise
            else:
                if not trap.sprung:
                    break
        scene.assert_nothing_torn(out)
        scene.merge(out)
        scene.assert_finished(out)
        shutil.rmtree(out)
    else:
        pytest.fail("the merge never passed")
    assert at > first or first > 1, "never called"


def test_one_directory_survives_a_failure_at_every_write_in_turn(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = scene.directory / "out"
    for runs in range(1, 100):
        with monkeypatch.context() as patch:
            set_trap(patch, "ShardWriter.write", Trap(SimulatedKill(), runs, once=True))
            try:
                scene.merge(out)
                break
            except SimulatedKill:
                scene.assert_nothing_torn(out)
    assert 1 < runs < 99  # how many depends on what other threads had written at each failure
    scene.assert_finished(out)
