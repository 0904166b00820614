"""A budget whose buffers have a given size, whatever else takes memory: small tensors are then handled as large ones."""

from __future__ import annotations

from streammerge.planning.memory.budget import Budget


class Fixed(Budget):
    """All that is not for the process is for buffers."""

    def less(self, nbytes: int) -> Budget:
        """Return the same budget."""
        return self
