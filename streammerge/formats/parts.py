"""What tensors are made of, and those that lie in one piece."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from streammerge.formats.refs import MadeRef, SourceRef, TensorRef
from streammerge.io.files import bad, quoted


def all_parts(refs: Iterable[SourceRef]) -> Iterator[SourceRef]:
    """Yield what some tensors are made of, themselves included, each object once and after its own parts."""
    seen: set[int] = set()

    def walk(some: Iterable[SourceRef]) -> Iterator[SourceRef]:
        for ref in some:
            if id(ref) not in seen:
                seen.add(id(ref))
                yield from walk(ref.parts)
                yield ref

    return walk(refs)


def contiguous(ref: SourceRef) -> TensorRef:
    """Return a tensor that a file holds as it is.

    Raises
    ------
    ModelError
        If it does not.
    """
    if (plain := ref.plain) is not None:
        return plain
    why = getattr(ref, "why_made", MadeRef.why_made)
    raise bad(ref.path, f"tensor {quoted(ref.name)} {why}: save it so, or convert it to safetensors")
