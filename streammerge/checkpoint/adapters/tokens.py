"""Single trained tokens of an adapter (`trainable_token_indices`), whose rows replace the embedding's."""

from __future__ import annotations

from collections.abc import Mapping

from streammerge.checkpoint.adapters.files import Adapter
from streammerge.checkpoint.adapters.head import renamed, shared_heads
from streammerge.checkpoint.adapters.names import Names
from streammerge.checkpoint.names import HEADS, is_embedding, is_head
from streammerge.checkpoint.refs.rows import PatchedRef
from streammerge.dtypes import FLOATS
from streammerge.formats.refs import SourceRef, TensorRef
from streammerge.io.files import bad, quoted


def with_tokens(
    adapter: Adapter,
    names: Names,
    base: Mapping[str, SourceRef],
    tensors: Mapping[str, SourceRef],
    *,
    tied: bool,
) -> dict[str, SourceRef]:
    """Return a model's tensors with the rows of single trained tokens replaced.

    A tied head that is stored separately gets the embedding's rows too, unless it has its own.

    Raises
    ------
    ModelError
        If the rows fit no embedding, or a token is out of range.
    """
    found = dict(tensors)
    shared = shared_heads(adapter) if tied else set()
    for module, values in adapter.tokens.items():
        if module in shared:
            continue
        name = _place(names, base, found, module, values, tied=tied)
        indices = adapter.settings.token_indices(module)
        found[name] = _patched(adapter, module, found[name], values, indices)
        own_head = any(is_head(f"{other}.weight") for other in adapter.tokens if other not in shared)
        if tied and is_embedding(name) and not own_head:
            for head in [head for head in found if is_head(head) and found[head].shape == found[name].shape]:
                found[head] = _patched(adapter, module, found[head], values, indices)
    return found


def _place(
    names: Names,
    base: Mapping[str, SourceRef],
    found: dict[str, SourceRef],
    module: str,
    values: TensorRef,
    *,
    tied: bool,
) -> str:
    """Return the embedding or head whose tokens were trained; a tied head gets its own tensor."""
    plain = f"{module}.weight"

    def fits(name: str) -> bool:
        return len(values.shape) == 2 == len(found[name].shape) and found[name].shape[1] == values.shape[1]

    name = plain if plain in found else names.find(plain, values.path, fits)
    if name is None and tied and is_head(plain):
        embeddings = [name for name in base if is_embedding(name) and fits(name)]
        if len(embeddings) == 1:
            name = next(head for head in HEADS if plain.endswith(head))
            found[name] = renamed(base[embeddings[0]], name)
    if name is None:
        raise bad(
            values.path,
            f"trained tokens of module {quoted(module)}, which the base has not: another base model's adapter",
        )
    if not fits(name):
        raise bad(
            values.path,
            f"trained tokens {list(values.shape)} do not fit {quoted(name)} {list(found[name].shape)}",
        )
    return name


def _patched(
    adapter: Adapter, module: str, embedding: SourceRef, values: TensorRef, indices: list[object]
) -> PatchedRef:
    path, n_rows = adapter.settings.path, embedding.shape[0]
    if embedding.dtype not in FLOATS:
        raise bad(
            embedding.path,
            f"tensor {quoted(embedding.name)} is {embedding.dtype}: trained tokens need floats; dequantise",
        )
    if len(indices) != values.shape[0]:
        raise bad(
            path,
            f"{len(indices)} trained tokens of module {quoted(module)}, but {values.shape[0]} rows of them",
        )
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < n_rows:
            raise bad(
                path, f"trained token {quoted(str(index), 40)} of module {quoted(module)} is none of {n_rows}"
            )
    import numpy as np

    rows = np.asarray(indices, np.int64)
    order = np.argsort(rows, kind="stable")
    twice = np.flatnonzero(np.diff(rows[order]) == 0)
    if twice.size:
        raise bad(path, f"trained token {rows[order][twice[0]]} of module {quoted(module)} is listed twice")
    return PatchedRef(embedding, rows[order], order.astype(np.int64), values)
