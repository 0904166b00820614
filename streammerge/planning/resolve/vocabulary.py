"""The output's vocabulary, and for each model the rows that represent the output's tokens.

A token keeps its id in the tokenizer that the config names; a union appends the other models' tokens. A model that lacks a
token gets a row for it: the base's row if the base has the token, else the mean of the rows of all models that have it,
else zeros. Rows without a token (padding of a vocabulary) are unchanged.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.locating import locate
from streammerge.checkpoint.names import embedding_of, has_tokens
from streammerge.checkpoint.refs.rows import GatheredRef, RowMap
from streammerge.checkpoint.tokenizer import MOST_ROWS, Tokenizer, read_tokenizer, tokenizer_digest
from streammerge.config.tokenizer import TokenizerSpec, TokenSource
from streammerge.config.wording import meant, refuse, shown
from streammerge.dtypes import FLOATS
from streammerge.errors import ConfigError, ModelError, printable
from streammerge.formats.refs import SourceRef, row_elements
from streammerge.planning.resolve.row_maps import (
    OWN,
    Ids,
    Sources,
    digest_of,
    is_identity,
    lenders_of,
    map_of,
    own_rows,
)
from streammerge.records import dataclass

_KEPT_TOKENIZERS = 3
"""Number of vocabularies held at a time in addition to the output's; one of 128,000 tokens takes about 30 MB."""


@dataclass(frozen=True)
class NewToken:
    """A token that the named tokenizer lacks."""

    text: str
    number: int
    about: Mapping[str, Any]
    """Its entry in the tokenizer that it comes from."""


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens of the output."""

    directory: Path
    """The folder whose tokenizer files the output gets."""
    has_gaps: bool
    """Whether the ids have gaps."""
    ids: Mapping[str, int]
    n_rows: int
    """One more than the highest id."""
    new: tuple[NewToken, ...]


@dataclass(frozen=True)
class Alignment:
    """The output's vocabulary, and a row map for each model."""

    directory: Path
    """The folder whose tokenizer files the output gets."""
    new: tuple[NewToken, ...]
    """Tokens that are added to the tokenizer files."""
    n_rows: int
    """Number of rows of the output's embedding, one per id, padding included."""
    maps: Mapping[str, RowMap | None]
    """The row map of each model; None if its rows are unchanged."""
    rows: Mapping[str, int]
    """Number of rows of each model's embedding."""
    order: tuple[str, ...]
    """The models in the order of their indices in the maps."""
    numbers: Ids | None
    """The output's id of each token of the template model, -1 if the output lacks it; None if all ids are the same."""
    notes: tuple[str, ...] = ()
    _gathered: dict[tuple[str, str], SourceRef] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of the maps."""
        return sum({id(rows): rows.nbytes for rows in self.maps.values() if rows is not None}.values())

    def gather(
        self, reference: str, name: str, ref: SourceRef, find: Callable[[str], SourceRef | None]
    ) -> SourceRef:
        """Return a model's tensor with its rows in the output's order; a tensor without a row per token is unchanged.

        Parameters
        ----------
        find
            Function that returns the tensor of the same name in the model with the given reference.
        """
        rows = self.maps.get(reference)
        if rows is None or not has_tokens(name, ref.shape, self.rows[reference]) or ref.is_gathered:
            return ref
        key = reference, name
        if key not in self._gathered:
            self._gathered[key] = self._make(name, ref, rows, find)
        return self._gathered[key]

    def _make(
        self, name: str, ref: SourceRef, rows: RowMap, find: Callable[[str], SourceRef | None]
    ) -> GatheredRef:
        lenders: list[Any] = [ref, *(None for _ in self.order)]
        for place in sorted({int(model) for model in np.unique(rows.models)} - {OWN}):
            lender = find(self.order[place - 1])
            if lender is None or row_elements(lender.shape) != row_elements(ref.shape):
                raise ModelError(
                    f"tensor {printable(name)}: {printable(self.order[place - 1])} must supply rows for "
                    f"{printable(ref.path)}, but "
                    + ("has no such tensor" if lender is None else "its rows have a different length")
                )
            lenders[place] = lender
        for tensor in (tensor for tensor in lenders if tensor is not None and tensor.dtype not in FLOATS):
            raise ModelError(
                f"tensor {printable(name)} in {printable(tensor.path)} is {tensor.dtype}, whose rows cannot be reordered for a "
                "different vocabulary: dequantise the model first"
            )
        dtypes = {tensor.dtype for tensor in lenders if tensor is not None}
        dtype = ref.dtype if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
        return GatheredRef(name, dtype, (rows.n_rows, *ref.shape[1:]), tuple(lenders), rows, ref)

    def digest(self) -> str:
        """Return a digest that identifies the vocabulary and the maps."""
        digest = hashlib.blake2b(digest_size=16)
        for token in self.new:
            digest.update(repr((token.text, token.number)).encode())
        for rows in map(self.maps.get, self.order):
            digest.update(b"=" if rows is None else digest_of(rows))
        return digest.hexdigest()


def align(spec: TokenizerSpec, template: TensorIndex, indexes: Mapping[str, TensorIndex]) -> Alignment:
    """Return the alignment of all models' vocabularies with the vocabulary that the config asks for.

    Raises
    ------
    ConfigError
        If the config names a token or a model that does not exist.
    ModelError
        If a model has no tokenizer, or no embedding.
    """
    order = tuple(indexes)
    tokenizers = _Tokenizers(indexes)
    rows = {reference: _embedding_rows(index) for reference, index in indexes.items()}
    vocabulary = _vocabulary(spec, template, tokenizers)
    same = [r for r in order if tokenizers.directory(r) == vocabulary.directory]
    n_rows = max([vocabulary.n_rows, *(rows[reference] for reference in same)])
    padding = -n_rows % spec.multiple_of
    own = [own_rows(vocabulary.ids, tokenizers[reference], rows[reference], n_rows) for reference in order]
    chosen, forced = _chosen(spec, vocabulary, tokenizers, rows, n_rows)
    lacking = np.flatnonzero((np.min(own, axis=0) < 0) | forced)
    lenders, nowhere = lenders_of(own, order.index(template.reference), chosen, lacking)
    maps: dict[str, RowMap | None] = {}
    known: dict[bytes, RowMap] = {}  # models with the same vocabulary share a map
    for place, reference in enumerate(order):
        found = map_of(np.where(forced, -1, own[place]), lenders, place + 1, padding)
        maps[reference] = (
            None if is_identity(found, rows[reference]) else known.setdefault(digest_of(found), found)
        )
    named = set(vocabulary.ids.values())
    n_zeros = sum(row in named for row in nowhere)
    notes = [f"{spec.path}: {n_zeros} tokens have no row in any model and get zeros"] if n_zeros else []
    if vocabulary.new and vocabulary.has_gaps:
        notes.append(
            f"{spec.path}: the token ids have gaps; check that the output's tokenizer maps "
            f"{shown(vocabulary.new[0].text)} to {vocabulary.new[0].number}"
        )
    return Alignment(
        vocabulary.directory,
        vocabulary.new,
        n_rows + padding,
        maps,
        rows,
        order,
        _renumbered(tokenizers[template.reference], vocabulary.ids),
        tuple(notes),
    )


def _renumbered(template: Tokenizer, ids: Mapping[str, int]) -> Ids | None:
    """Return the output's id of each token of the template model; None if all are the same."""
    numbers = np.full(template.n_rows, -1, np.int32)
    for text, number in template.ids.items():
        numbers[number] = ids.get(text, numbers[number])
    kept = np.array(sorted(set(template.ids.values())), np.int32)
    return None if bool((numbers[kept] == kept).all()) else numbers


class _Tokenizers:
    """The tokenizers of all models: read on demand, shared between models with equal ones, few at a time."""

    def __init__(self, indexes: Mapping[str, TensorIndex]) -> None:
        self._indexes = indexes
        self._digests: dict[str, str] = {}
        self._known: OrderedDict[str, Tokenizer] = OrderedDict()

    def __iter__(self) -> Iterator[str]:
        return iter(self._indexes)

    def __contains__(self, reference: str) -> bool:
        return reference in self._indexes

    def __getitem__(self, reference: str) -> Tokenizer:
        index = self._indexes[reference]
        if reference not in self._digests:
            self._digests[reference] = tokenizer_digest(index.directory)
        digest = self._digests[reference]
        found = self._known.get(digest) or read_tokenizer(index.directory)
        if found is None:
            raise ModelError(
                f"{printable(reference)}: no readable tokenizer (tokenizer.json, vocab.json, vocab.txt, tokenizer.model), which "
                "`tokenizer_source` needs to align vocabularies"
            )
        self._known[digest] = found
        self._known.move_to_end(digest)
        if len(self._known) > _KEPT_TOKENIZERS:
            self._known.popitem(last=False)
        return found

    def directory(self, reference: str) -> Path:
        """Return the directory of a model's tokenizer."""
        return self._indexes[reference].directory


def _embedding_rows(index: TensorIndex) -> int:
    """Return the number of rows of a model's token embedding.

    Raises
    ------
    ModelError
        If it has none.
    """
    name = embedding_of(index)
    if name is None:
        raise ModelError(f"{printable(index.reference)}: no tensor has a known name of a token embedding")
    return index[name].shape[0]


def _directory_of(spec: TokenizerSpec) -> Path:
    """Return the directory of a source that is not one of the models."""
    try:
        return locate(spec.source)
    except ModelError as error:
        if "/" in spec.source:
            raise
        hint = meant(spec.source, ("union", "base"))
        raise ConfigError(
            f"{spec.path}: {shown(spec.source)} is not `union`, `base` or an available model{hint}"
        ) from error


def _vocabulary(spec: TokenizerSpec, template: TensorIndex, tokenizers: _Tokenizers) -> _Vocabulary:
    """Return the tokens of the output: those of the named tokenizer, then the others that the config asks for."""
    directory = tokenizers.directory(template.reference)
    if spec.source in ("union", "base"):
        source = tokenizers[template.reference]
    elif spec.source in tokenizers:
        source, directory = tokenizers[spec.source], tokenizers.directory(spec.source)
    else:
        directory = _directory_of(spec)
        found = read_tokenizer(directory)
        if found is None:
            refuse(spec.path, f"{shown(spec.source)} has no readable tokenizer")
        source = found
    ids = dict(source.ids)
    new: list[NewToken] = []
    n_rows = source.n_rows

    def add(text: str, about: Mapping[str, Any]) -> None:
        nonlocal n_rows
        if text and text not in ids:  # loaders skip a token without text
            if n_rows >= MOST_ROWS:
                refuse(spec.path, f"more than {MOST_ROWS} tokens")
            ids[text] = n_rows
            new.append(NewToken(text, n_rows, about))
            n_rows += 1

    if spec.source == "union":
        for reference in tokenizers:
            tokenizer = tokenizers[reference]
            for text in tokenizer.ids:
                add(text, tokenizer.added.get(text, {}))
    for text in spec.tokens:
        if text not in ids:
            add(
                text, next((tokenizers[r].added[text] for r in tokenizers if text in tokenizers[r].added), {})
            )
    has_gaps = source.n_rows > len(set(source.ids.values()))
    return _Vocabulary(directory, has_gaps, ids, n_rows, tuple(new))


def _chosen(
    spec: TokenizerSpec,
    vocabulary: _Vocabulary,
    tokenizers: _Tokenizers,
    rows: Mapping[str, int],
    n_rows: int,
) -> tuple[dict[int, Sources], NDArray[np.bool_]]:
    """Return the sources that the config gives for some rows, and the rows where they apply to all models."""
    forced = np.zeros(n_rows, np.bool_)
    chosen: dict[int, Sources] = {}
    for text, source in spec.tokens.items():
        number = vocabulary.ids[text]
        chosen[number] = [] if source.model is None else [_row_named(source, text, tokenizers, rows)]
        forced[number] = source.force
    return chosen, forced


def _row_named(
    source: TokenSource, text: str, tokenizers: _Tokenizers, rows: Mapping[str, int]
) -> tuple[int, int]:
    """Return the index of the model that the config names for a token, and the row there."""
    assert source.model is not None
    if source.model not in tokenizers:
        refuse(source.path, f"{shown(source.model)} is not one of the models being merged")
    wanted = text if source.token is None else source.token
    row = wanted if isinstance(wanted, int) else tokenizers[source.model].ids.get(wanted, -1)
    if not 0 <= row < rows[source.model]:
        refuse(source.path, f"{shown(source.model)} has no row for the token {shown(wanted)}")
    return list(tokenizers).index(source.model), row
