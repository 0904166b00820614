"""Which groups of kernels serve a call: those alone are compiled before a merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from streammerge.algebra.block import Call
from streammerge.algebra.rules import TaskVectorMerge, ranked
from streammerge.algebra.scores import Importance, Selection, Spread
from streammerge.algebra.task_vectors import TaskVector

Names = frozenset[str]
"""Names of groups in `streammerge.backends.cpu.compile`."""

_OF_RANKED: Mapping[type, Names] = {
    TaskVector: frozenset({"ranks"}),
    Spread: frozenset({"spread"}),
    Importance: frozenset({"importance"}),
}


def groups_of_selection(selection: Selection | None) -> Names:
    """Return what serves the sums, and the merge, of selected elements."""
    chosen = frozenset[str]() if selection is None else _OF_RANKED[type(selection.score)]
    return chosen | {"selected"}


def groups_of_merge(merge: TaskVectorMerge) -> Names:
    """Return what serves a merge of task vectors, and the count of elected signs."""
    return frozenset({"ranked" if ranked(merge) else "task_vectors"})


_OF_METHOD: Mapping[str, Callable[[Any], Names]] = {
    "count_keys": lambda ranked: _OF_RANKED[type(ranked)],
    "ties": lambda ranked: _OF_RANKED[type(ranked)],
    "abs_sums": lambda vector: frozenset({"ranked" if vector.rank_drop else "abs_sums"}),
    "squares": groups_of_selection,
    "touches": lambda _: frozenset({"touched"}),
    "dots": lambda _: frozenset({"dots"}),
    "add_column_dots": lambda _: frozenset({"columns"}),
    "sign_total": groups_of_merge,
    "fisher_squares": lambda _: frozenset({"fisher"}),
    "words_between": lambda _: frozenset({"words"}),
}
"""By the method of a block."""


def groups_of_call(call: Call) -> Names:
    """Return the groups of kernels that serve a call."""
    return _OF_METHOD[call.method](call.subject)
