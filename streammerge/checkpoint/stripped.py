"""Models with tensor names from which the prefix of a training program is removed."""

from __future__ import annotations

from dataclasses import replace

from streammerge.checkpoint.index import TensorIndex
from streammerge.errors import ModelError, printable
from streammerge.io.files import quoted


def stripped(index: TensorIndex, prefix: str) -> TensorIndex:
    """Return the tensors whose names begin with a prefix, with the prefix removed; a note counts the tensors left out.

    Raises
    ------
    ModelError
        If no name begins with the prefix, or the model is quantised.
    """
    if not prefix:
        return index
    where = f"{printable(index.reference)}: strip: {quoted(prefix, 60)}"
    if index.quantization is not None:
        raise ModelError(f"{where}: a quantised model's names are those that declare it: leave `strip` out")
    named = {name: name.removeprefix(prefix) for name in index if name.startswith(prefix) and name != prefix}
    if not named:
        first = next(iter(index), "")
        raise ModelError(f"{where}: no tensor's name begins so (the first is {quoted(first)})")
    left = [name for name in index if name not in named]
    note = f"{len(left)} tensors whose names do not begin with {quoted(prefix, 60)} are left out"
    return replace(
        index,
        tensors={own: index[name].renamed(own) for name, own in named.items()},
        notes=(*index.notes, *([f"{note} (first: {quoted(left[0])})"] if left else [])),
    )
