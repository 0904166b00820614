"""Kernels by Triton's compiler at run time: only on AMD's GPUs, and where it is refused the user is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from streammerge.backends.fused.triton_launcher import why_not_amd
from streammerge.backends.gpu import backend


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    why_not_amd.cache_clear()
    yield
    why_not_amd.cache_clear()


def test_torch_for_other_devices_is_not_asked_to_compile() -> None:
    assert why_not_amd() == "this is no torch for AMD"


def test_what_fails_at_the_first_kernel_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4", raising=False)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no HIP GPUs are available\nand more")

    monkeypatch.setattr(torch, "empty", refuse)
    pytest.importorskip("triton")
    assert why_not_amd() == "RuntimeError: no HIP GPUs are available"


def test_the_user_is_told_who_computes_where_nothing_loads_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "loader", lambda: None)
    assert backend.lacks() == backend.EAGER
    monkeypatch.setattr(backend, "why_not_amd", lambda: None)
    assert backend.lacks() == backend.FOR_AMD
    monkeypatch.setattr(backend, "loader", lambda: "cuda-core")
    assert backend.lacks() is None
