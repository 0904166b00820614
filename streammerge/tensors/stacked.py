"""Ranges of a tensor as ranges of those that it is stacked of: experts that are stored one by one, or all in one tensor.

Where each part is whole rows, one after the other, its elements can be brought to a device as they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from streammerge.checkpoint.refs.blocks import Block, BlocksRef, overlapping
from streammerge.formats.refs import Ref, RenamedRef


class Leaf(NamedTuple):
    """A range of a tensor that is not stacked."""

    ref: Ref
    start: int
    stop: int
    place: int
    """The first element's place, counted from the start of the range that was asked for."""


def leaves(ref: Ref, start: int, stop: int) -> Iterator[Leaf]:
    """Yield the ranges that elements `start` to `stop` of a tensor consist of, in order; itself if it is not stacked.

    A stacked tensor may consist of others.
    """
    own = _own(ref)
    if not isinstance(own, BlocksRef) or not all(_is_rows(block, own) for block in own.blocks):
        yield Leaf(ref, start, stop, 0)
        return
    columns = max(1, own.shape[-1])
    for block, (top, bottom, _, _) in overlapping(own, start // columns, -(-stop // columns), 0, columns):
        first, last = max(start, top * columns), min(stop, bottom * columns)
        inside = block.start - block.row * columns
        for leaf in leaves(block.tensor, inside + first, inside + last):
            yield leaf._replace(place=leaf.place + first - start)


def all_leaves(ref: Ref) -> Iterator[Ref]:
    """Yield the tensors that a tensor consists of; one from which several parts are taken is yielded for each."""
    return (leaf.ref for leaf in leaves(ref, 0, ref.n_elements))


def _is_rows(block: Block, ref: BlocksRef) -> bool:
    """Return whether a block is consecutive elements of its tensor, of the dtype of the whole, in whole rows."""
    return (
        not block.transposed
        and block.columns == max(1, ref.shape[-1])
        and (block.pitch == block.columns or block.rows == 1)
        and block.tensor.dtype == ref.dtype
    )


def _own(ref: Ref) -> Ref:
    return _own(ref.source) if isinstance(ref, RenamedRef) else ref
