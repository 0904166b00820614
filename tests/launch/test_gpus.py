"""`--device cuda` on a machine with several GPUs: one process for each."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from streammerge.cli import launching
from streammerge.cli.launching import on_all_gpus, shared
from streammerge.engine.joined import NotSharedError
from streammerge.launch import processes
from streammerge.launch.base import Needs
from streammerge.launch.processes import Processes


@pytest.mark.parametrize(
    ("visible", "out", "options", "where"),
    [
        ("0,1,2", "merged", {"device": "cuda"}, "processes:3"),
        ("0", "merged", {"device": "cuda"}, None),
        ("0,1", "merged", {"device": "cuda:1"}, None),
        ("0,1", "merged", {"device": "auto"}, None),
        ("0,1", "merged.safetensors", {"device": "cuda"}, None),
        ("0,1", "s3://bucket/merged", {"device": "cuda"}, None),
        ("0,1", "merged", {"device": "cuda", "profile": "profile.json"}, None),
        ("0,1", "merged", {"device": "cuda", "join": True}, None),
    ],
)
def test_several_gpus_share_a_merge_that_can_be_shared(
    visible: str, out: str, options: dict[str, Any], where: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert on_all_gpus(out, options) == where


def test_a_merge_that_cannot_be_shared_takes_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise NotSharedError("output: lora")

    monkeypatch.setattr(launching, "run_on", refuse)
    assert not shared("processes:2", "config.yml", "out")
    monkeypatch.setattr(launching, "run_on", lambda *arguments, **options: None)
    assert shared("processes:2", "config.yml", "out")


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
