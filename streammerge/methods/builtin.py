"""Importing this module registers every method that ships with the package."""

from streammerge.methods import dare, linear, passthrough, task_arithmetic, ties

__all__ = ["dare", "linear", "passthrough", "task_arithmetic", "ties"]
