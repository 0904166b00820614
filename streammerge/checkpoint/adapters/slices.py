"""Adapters of single experts on a base with fused experts: each slice of the fused tensor gets its own factors.

Adapters made with transformers 4, where experts are modules, use names such as ``experts.3.gate_proj``. The fused tensor
``experts.gate_up_proj`` [experts, 2 inner, hidden] stacks gate on up projection, or places them side by side if the last
two axes are exchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from streammerge.checkpoint.adapters.experts import pair
from streammerge.checkpoint.adapters.files import Parts
from streammerge.checkpoint.adapters.names import Names
from streammerge.checkpoint.refs.adapted import AdaptedRef
from streammerge.checkpoint.refs.blocks import Block, BlocksRef
from streammerge.dtypes import FLOATS
from streammerge.formats.refs import SourceRef
from streammerge.io.files import bad, quoted
from streammerge.lazy import late_pattern
from streammerge.records import dataclass

_EXPERT = late_pattern(r"(?P<stem>.+\.experts)\.(?P<expert>\d{1,6})\.(?P<word>\w+)", re.DOTALL)
_PLACES = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
    "w1": ("gate_up_proj", 0, 2),
    "w3": ("gate_up_proj", 1, 2),
    "w2": ("down_proj", 0, 1),
}
"""For each projection: the fused parameter, the index of its part, and the number of parts."""
Adapted = Callable[[str, Parts, SourceRef], AdaptedRef]
"""Function that applies a module's factors to a weight."""


@dataclass(frozen=True)
class _Slice:
    """The position of one expert's projection in a fused tensor."""

    name: str
    row: int
    """First row and column, in rows of the last axis over all experts."""
    column: int
    rows: int
    columns: int


class Slices:
    """Collects the changes of single experts, and assembles the fused tensors."""

    def __init__(self, names: Names, base: Mapping[str, SourceRef]) -> None:
        self._names, self._base = names, base
        self._changes: dict[str, dict[_Slice, tuple[str, Parts]]] = {}

    def take(self, module: str, parts: Parts) -> bool:
        """Collect a module's factors; return whether it is an expert in a fused tensor.

        Raises
        ------
        ModelError
            If the tensor has no such expert, or its shape is ambiguous.
        """
        match = _EXPERT.fullmatch(module)
        if match is None or match["word"] not in _PLACES:
            return False
        path = next(iter(parts.values())).path
        leaf, part, n_parts = _PLACES[match["word"]]
        name = self._names.find(f"{match['stem']}.{leaf}", path)
        if name is None or len(self._base[name].shape) != 3:
            return False
        place = self._place(name, int(match["expert"]), part, n_parts, module, parts)
        self._changes.setdefault(name, {})[place] = module, parts
        return True

    def _place(self, name: str, expert: int, part: int, n_parts: int, module: str, parts: Parts) -> _Slice:
        embedding, a, b = pair(module, parts)
        n_experts, rows, columns = self._base[name].shape
        sides = (0, 0) if embedding or len(a.shape) != 2 or len(b.shape) != 2 else (b.shape[0], a.shape[1])
        straight = (sides[0] * n_parts, sides[1]) == (rows, columns)
        flipped = (sides[1], sides[0] * n_parts) == (rows, columns)
        if straight == flipped or expert >= n_experts or "lora_B.bias" in parts:
            cause = "may lie in it either way" if straight and flipped else "do not fit it"
            raise bad(
                a.path,
                f"module {quoted(module)}: factors {list(b.shape)} and {list(a.shape)} {cause}: {quoted(name)} "
                f"{list(self._base[name].shape)} holds all experts of the base; merge the adapter with PEFT first",
            )
        if straight:
            return _Slice(name, expert * rows + part * sides[0], 0, sides[0], columns)
        return _Slice(name, expert * rows, part * sides[0], rows, sides[0])

    def together(self, tensors: Mapping[str, SourceRef], adapted: Adapted) -> dict[str, SourceRef]:
        """Return the fused tensors, assembled from slices with and without factors."""
        found: dict[str, SourceRef] = {}
        for name, changes in self._changes.items():
            fused = tensors[name]
            if fused.dtype not in FLOATS:
                raise bad(
                    fused.path,
                    f"tensor {quoted(name)} is {fused.dtype}: an adapter goes on float weights; dequantise",
                )
            blocks = [
                self._block(fused, place, adapted, changes.get(place))
                for place in _slices(fused, list(changes))
            ]
            dtype = "F64" if fused.dtype == "F64" else "F32"
            found[name] = BlocksRef(name, dtype, fused.shape, tuple(blocks))
        return found

    def _block(
        self, fused: SourceRef, place: _Slice, adapted: Adapted, change: tuple[str, Parts] | None
    ) -> Block:
        pitch = fused.shape[2]
        start = place.row * pitch + place.column
        if change is None:
            return Block(fused, start, pitch, place.row, place.column, place.rows, place.columns)
        sides = (place.rows, place.columns)
        own = BlocksRef(fused.name, fused.dtype, sides, (Block(fused, start, pitch, 0, 0, *sides),))
        return Block(adapted(*change, own), 0, place.columns, place.row, place.column, *sides)


def _slices(fused: SourceRef, changed: list[_Slice]) -> list[_Slice]:
    """Return a fused tensor divided at its changed slices, by row, then by column."""
    n_experts, rows, columns = fused.shape
    some = changed[0]
    high, wide = min(rows, some.rows), min(columns, some.columns)
    return [
        _Slice(fused.name, row, column, high, wide)
        for row in range(0, n_experts * rows, high)
        for column in range(0, columns, wide)
    ]
