"""Row maps: for each row of the output, the row of a model's tensor, or the rows whose mean it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.refs.rows import RowMap
from streammerge.checkpoint.tokenizer import Tokenizer
from streammerge.records import dataclass

Ids = NDArray[np.int32]
OWN = 0
"""Index of the model's own tensor in a `RowMap`; the tensors of all models follow."""
Sources = Sequence[tuple[int, int]]
"""Rows whose mean replaces a row: pairs of a model's index and the row in that model."""


def own_rows(ids: Mapping[str, int], tokenizer: Tokenizer, n_own: int, n_rows: int) -> Ids:
    """Return for each row of the output the row of the model's own tensor; -1 if it has none.

    Rows without a token on either side keep their place: padding of a vocabulary, or reserved rows.
    """
    found = np.full(n_rows, -1, np.int32)
    named = np.zeros(max(n_rows, n_own), np.bool_)
    for text, number in ids.items():
        named[number] = True
        row = tokenizer.ids.get(text, -1)
        if 0 <= row < n_own:
            found[number] = row
    for number in tokenizer.ids.values():
        named[min(number, named.size - 1)] |= number < named.size
    free = np.flatnonzero(~named[: min(n_rows, n_own)])
    found[free] = free
    return found


@dataclass(frozen=True)
class Lenders:
    """The rows that replace rows which some model lacks, one after the other."""

    counts: Ids
    starts: Ids
    places: NDArray[np.int16]
    """Indices of models, from 1."""
    rows: Ids


def lenders_of(
    own: Sequence[Ids], base: int, chosen: Mapping[int, Sources], lacking: NDArray[Any]
) -> tuple[Lenders, list[int]]:
    """Return the replacement of each row that a model lacks, and the rows that have none."""
    counts = np.zeros(own[0].size, np.int32)
    places: list[int] = []
    rows: list[int] = []
    nowhere: list[int] = []
    for number in lacking.tolist():
        sources = chosen.get(number)
        if sources is None:
            having = [place for place, mine in enumerate(own) if mine[number] >= 0]
            having = [base] if base in having else having
            sources = [(place, int(own[place][number])) for place in having]
            if not sources:
                nowhere.append(number)
        counts[number] = len(sources)
        places += [place + 1 for place, _ in sources]
        rows += [row for _, row in sources]
    starts = np.concatenate(([0], np.cumsum(counts)[:-1])).astype(np.int32)
    return Lenders(counts, starts, np.array(places, np.int16), np.array(rows, np.int32)), nowhere


def map_of(own: Ids, lenders: Lenders, place: int, padding: int) -> RowMap:
    """Return the map of the model with index `place`: its own row if it has one, else the replacement."""
    lacks = own < 0
    counts = np.where(lacks, lenders.counts, 1)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    models = np.zeros(starts[-1], np.int16)
    rows = np.empty(starts[-1], np.int32)
    rows[starts[:-1][~lacks]] = own[~lacks]
    n = lenders.counts[lacks]
    steps = np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
    targets, sources = (np.repeat(begin[lacks], n) + steps for begin in (starts[:-1], lenders.starts))
    models[targets], rows[targets] = lenders.places[sources], lenders.rows[sources]
    models[models == place] = OWN
    return RowMap(starts, models, rows, padding)


def digest_of(rows: RowMap) -> bytes:
    """Return a digest that identifies a map."""
    digest = hashlib.blake2b(str(rows.padding).encode(), digest_size=16)
    for part in (rows.starts, rows.models, rows.rows):
        digest.update(part.tobytes())
    return digest.digest()


def is_identity(rows: RowMap, n_own: int) -> bool:
    """Return whether a map leaves a model's rows unchanged."""
    alone = not rows.padding and rows.rows.size == rows.n_rows == n_own and not rows.models.any()
    return alone and bool((np.diff(rows.starts) == 1).all()) and bool((rows.rows == np.arange(n_own)).all())
