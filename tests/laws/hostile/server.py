"""A warm process that runs the command once per request, in a child of its own, and says what that took.

A request is one line of JSON on stdin: ``{"arguments": [...], "cwd": ..., "seconds": ...}``; the answer one line on
stdout: exit code, stdout and stderr, the operating system's peak of the child in bytes, and wall seconds.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any


def run(request: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Fork, run the command line there, and wait for it no longer than it is given."""
    began = time.monotonic()
    outputs = [scratch / "stdout", scratch / "stderr"]
    pid = os.fork()
    if pid == 0:
        child(request, outputs)
    pidfd = os.pidfd_open(pid)
    ready, _, _ = select.select([pidfd], [], [], request["seconds"])
    os.close(pidfd)
    if not ready:
        os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status) if ready else "hung"
    stdout, stderr = (path.read_bytes().decode("utf-8", "backslashreplace") for path in outputs)
    return {
        "code": code,
        "stdout": stdout,
        "stderr": stderr,
        "peak": usage.ru_maxrss << 10,
        "seconds": time.monotonic() - began,
    }


def child(request: dict[str, Any], outputs: list[Path]) -> None:
    """Become the command."""
    from streammerge import cli

    for descriptor, path in ((1, outputs[0]), (2, outputs[1])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
    sys.argv = ["streammerge", *request["arguments"]]
    code: object = 99
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 98)


def warm(scratch: Path) -> None:
    """Import all that the commands need but torch, and load the kernels: a child that did it would take a second."""
    import streammerge.api
    import streammerge.cli
    import streammerge.estimate.fisher.importing
    import streammerge.methods
    from streammerge.backends.cpu.compile import ensure_compiled
    from tests.laws.hostile.case import sound

    packages = (
        streammerge.checkpoint,
        streammerge.cli,
        streammerge.formats,
        streammerge.methods,
        streammerge.tensors,
    )
    for package in packages:
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    ensure_compiled()
    place = scratch / "warm"
    place.mkdir()
    sound(place)
    os.chdir(place)
    streammerge.api.merge("config.yml", "out")
    assert "torch" not in sys.modules
    assert threading.active_count() == 1, "a process of several threads must not be forked"
    gc.collect()
    gc.freeze()  # a child that collects garbage would copy all of the memory


def main() -> None:
    """Prepare, then serve."""
    scratch = Path(sys.argv[1])
    warm(scratch)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line), scratch)), flush=True)


if __name__ == "__main__":
    main()
