"""Importing this module registers every method that ships with the package."""

from streammerge.methods import dare, fisher, linear, passthrough, task_arithmetic, ties

__all__ = ["dare", "fisher", "linear", "passthrough", "task_arithmetic", "ties"]
