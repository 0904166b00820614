"""The registry of backends, by name."""

from __future__ import annotations

from streammerge.backends.base import Backend
from streammerge.backends.cpu.backend import CPU
from streammerge.backends.gpu.backend import FUSED
from streammerge.backends.torch.backend import CUDA, TORCH

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (CPU, TORCH, FUSED, CUDA)}
"""Of several on the same kind of device, the first is chosen; it names the one that does the rest."""


def register_backend(backend: Backend) -> None:
    """Add a backend; ``device=NAME`` then selects it.

    Raises
    ------
    ValueError
        If its name is taken.
    """
    if backend.name in BACKENDS:
        raise ValueError(f"backend {backend.name!r} already exists: choose a different name")
    BACKENDS[backend.name] = backend
