"""Fixtures that several files of this folder ask for."""

from __future__ import annotations

from tests.methods.users import methods, paths

__all__ = ["methods", "paths"]
