"""Fixtures that several files of this folder ask for."""

from __future__ import annotations

from tests.formats.safetensors_cases import write

__all__ = ["write"]
