"""`--device cuda` on a machine with several GPUs: one process for each."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from streammerge.cli import launching
from streammerge.cli.entry import cli
from streammerge.cli.launching import on_all_gpus, shared
from streammerge.engine.joined import NotSharedError
from streammerge.errors import BudgetError, InputError
from streammerge.launch.base import Needs
from streammerge.launch.launchers import processes
from streammerge.launch.launchers.processes import Processes
from streammerge.planning.backend import CUDA_LEAST


@pytest.mark.parametrize(
    ("visible", "out", "options", "count"),
    [
        ("0,1,2", "merged", {"device": "cuda"}, 3),
        ("0", "merged", {"device": "cuda"}, 1),
        ("", "merged", {"device": "cuda"}, 1),
        ("0,1", "merged", {"device": "cuda", "memory": 2 * CUDA_LEAST}, 2),
        ("0,1", "merged", {"device": "cuda", "memory": 2 * CUDA_LEAST - 1}, 1),
        ("0,1", "merged", {"device": "cuda:1"}, 1),
        ("0,1", "merged", {"device": "auto"}, 1),
        ("0,1", "merged.safetensors", {"device": "cuda"}, 1),
        ("0,1", "s3://bucket/merged", {"device": "cuda"}, 1),
        ("0,1", "merged", {"device": "cuda", "profile": "profile.json"}, 1),
        ("0,1", "merged", {"device": "cuda", "join": True}, 1),
    ],
)
def test_several_gpus_share_a_merge_that_can_be_shared(
    visible: str, out: str, options: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert on_all_gpus(out, options) == count


@pytest.mark.parametrize("error", [NotSharedError("output: lora"), BudgetError("the share is too little")])
def test_a_merge_that_cannot_be_shared_takes_one_gpu(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(launching, "run_on", refuse)
    assert not shared(2, "config.yml", "out")
    monkeypatch.setattr(launching, "run_on", lambda *arguments, **options: None)
    assert shared(2, "config.yml", "out")


@pytest.mark.parametrize("given", [["--device", "cuda"], ["--cuda"], ["--gpu-rich"]])
def test_all_gpus_together_take_the_memory_that_was_given(
    given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process has its share, the plan too, and the user is told."""
    called: list[Any] = []

    def stop(*arguments: Any) -> None:
        called.extend(arguments)
        raise InputError("that was enough")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr("streammerge.api.launching.merge_on", stop)
    line = ["merge", "c.yml", "out", "--memory", "8GiB", *given]
    with pytest.raises(InputError, match="that was enough"):
        cli.main(line, standalone_mode=False)
    where, _, _, command, planned, _, _, told = called
    assert where == "processes:4"
    assert command[command.index("--memory") + 1] == str(2 << 30)
    assert (planned["memory"], planned["device"]) == (2 << 30, "cuda")
    assert told == {"device_reason": "4 GPUs, by a process for each with --memory 2.0 GiB"}


def test_each_process_sees_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Started:
        pid = 0

        def __init__(self, command: list[str], env: dict[str, str], **how: Any) -> None:
            seen.append((env["CUDA_VISIBLE_DEVICES"], command[command.index("merge") :][:2]))

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    monkeypatch.setattr(subprocess, "Popen", Started)
    monkeypatch.setattr(processes.os, "sched_setaffinity", lambda pid, cpus: None)
    launcher = Processes(Needs(None, 1 << 30, 1, "cuda"))
    assert launcher.count == 2
    for number in range(3):
        launcher.start(number, ["merge", "ties.yml"])
    for one in launcher._running.values():
        one.out.close()
        one.err.close()
    assert [name for name, _ in seen] == ["GPU-a", "GPU-b", "GPU-a"]
    assert seen[0][1] == ["merge", "ties.yml"]
