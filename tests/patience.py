"""How long a test waits for what must happen."""

PATIENCE = 600.0
"""Seconds after which what hangs is given up: far more than anything here takes on a slow machine with other work."""
