"""Compare vocabularies that the config does not align: rows of one place should be the same token in all models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.names import is_embedding, is_head
from streammerge.checkpoint.tokenizer import Tokenizer, read_tokenizer, tokenizer_digest
from streammerge.errors import ModelError, printable
from streammerge.io.volumes import is_url
from streammerge.planning.files.surroundings import is_single_file
from streammerge.planning.job import Job


def compare_tokens(models: Sequence[TensorIndex], template: TensorIndex, jobs: Sequence[Job]) -> list[str]:
    """Return a warning for each model some of whose rows are different tokens from those of the template model.

    Only models whose rows are merged are compared; one without a readable tokenizer is passed over.

    Parameters
    ----------
    models
        The models of the plan, which the jobs count.

    Raises
    ------
    ModelError
        If most tokens of a model have different rows: such rows have nothing in common.
    """
    groups: dict[tuple[str, ...], list[TensorIndex]] = {}
    for job in jobs:
        if template.is_pipeline or job.kind != "merge" or not (is_embedding(job.name) or is_head(job.name)):
            continue
        taken = [models[i] for i in job.members or range(len(models))]
        together = [template, *taken] if job.base is not None or template in taken else taken
        groups.setdefault(tuple(index.reference for index in together), together)
    notes: dict[str, None] = {}
    for first, *others in groups.values():
        notes |= dict.fromkeys(_compared(first, others))
    return list(notes)


def _compared(first: TensorIndex, others: Sequence[TensorIndex]) -> Iterator[str]:
    """Yield the differences of models from the first; at most two tokenizers are in memory."""
    seen = {"", digest := _digest(first)}
    by_digest = {found: index for index in others if (found := _digest(index)) not in seen}
    differing = list(by_digest.values())
    own = _tokenizer(first) if digest and differing else None
    for index in differing if own is not None else ():
        other = _tokenizer(index)
        if other is not None and own is not None:
            yield from _difference(first, own, index, other)


def _digest(index: TensorIndex) -> str:
    """Return a digest of a model's tokenizer; empty if it is unknown which tokenizer is its own, or it is unreadable."""
    if is_url(index.reference) or is_single_file(index):
        return ""
    try:
        return tokenizer_digest(index.directory)
    except ModelError:
        return ""


def _tokenizer(index: TensorIndex) -> Tokenizer | None:
    try:
        return read_tokenizer(index.directory)
    except ModelError:
        return None


def _difference(template: TensorIndex, own: Tokenizer, index: TensorIndex, other: Tokenizer) -> list[str]:
    mine = {number: token for token, number in own.ids.items() if other.ids.get(token) != number}
    others = {number: token for token, number in other.ids.items() if own.ids.get(token) != number}
    rows = sorted(mine.keys() & others.keys())
    if not rows:
        return []
    first = rows[0]
    many = 2 * len(rows) > min(len(own.ids), len(other.ids))
    verb = "is a different token" if len(rows) == 1 else "are different tokens"
    what = (
        f"{printable(index.reference)} and {printable(template.reference)}: {len(rows)} rows of their vocabularies {verb} (first: "
        f"{first}, {printable(repr(others[first]), 60)} and {printable(repr(mine[first]), 60)})"
    )
    cure = "`tokenizer_source: base` (or union, or a model) finds each token's own row"
    if many:
        raise ModelError(f"{what}, so that their means mean nothing: {cure}")
    return [f"{what}, which are merged as they lie; {cure}"]
