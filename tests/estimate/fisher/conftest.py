"""Fixtures that several files of this folder ask for."""

from __future__ import annotations

from tests.estimate.fisher.stores import paths, small_chunks

__all__ = ["paths", "small_chunks"]
