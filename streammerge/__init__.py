"""Merge neural-network checkpoints larger than memory: streaming, exact, reproducible, resumable."""

__version__ = "0.1.0"
