"""The parts that tensors are made of, and contiguous tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from streammerge.formats.refs import MadeRef, SourceRef, TensorRef
from streammerge.io.files import bad, quoted


def all_parts(refs: Iterable[SourceRef]) -> Iterator[SourceRef]:
    """Yield tensors and all their parts, each object once and after its own parts."""
    seen: set[int] = set()

    def walk(some: Iterable[SourceRef]) -> Iterator[SourceRef]:
        for ref in some:
            if id(ref) not in seen:
                seen.add(id(ref))
                yield from walk(ref.parts)
                yield ref

    return walk(refs)


def contiguous(ref: SourceRef) -> TensorRef:
    """Return the tensor as a `TensorRef`, if a file holds it unchanged.

    Raises
    ------
    ModelError
        If no file holds it unchanged.
    """
    if (plain := ref.plain) is not None:
        return plain
    why = getattr(ref, "why_made", MadeRef.why_made)
    raise bad(ref.path, f"tensor {quoted(ref.name)} {why}: save it so, or convert it to safetensors")
