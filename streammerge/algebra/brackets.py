"""A rule that is not known yet, between two that are: one that keeps surely, and one that keeps possibly.

A method turns thresholds into the cuts of its rule. Given a threshold that is surely too high, and one that is surely too
low, it makes two rules. Where both keep the same entries of an element, the element is decided: the rule between them
merges it to the same value. The others are settled when the thresholds are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from streammerge.algebra.rules.task_vector_merge import TaskVectorMerge
from streammerge.algebra.task_vectors import Cut
from streammerge.records import dataclass


@dataclass(frozen=True)
class Edge:
    """One cut of a rule, and the statistic that it is made from."""

    vector: int
    """Index of the task vector."""
    outliers: bool
    """True for the cut of outliers."""
    statistic: int
    """Index of the statistic among those of its round."""

    def cut_of(self, rule: TaskVectorMerge) -> Cut:
        """Return the cut of a rule at this edge."""
        vector = rule.vectors[self.vector]
        cut = vector.outliers if self.outliers else vector.cut
        assert cut is not None
        return cut


def uncut(rule: TaskVectorMerge) -> TaskVectorMerge:
    """Return the same rule for entries that all survive."""
    vectors = (replace(vector, drop=0, drop_end=0, cut=None, outliers=None) for vector in rule.vectors)
    return replace(rule, vectors=tuple(vectors))


def same_cuts_aside(one: TaskVectorMerge, other: TaskVectorMerge) -> bool:
    """Return whether two rules differ only in the thresholds of their cuts, and the limits."""

    def bare(rule: TaskVectorMerge) -> TaskVectorMerge:
        def at_zero(cut: Cut | None) -> Cut | None:
            return None if cut is None else replace(cut, key=0, limit=0)

        vectors = (replace(v, cut=at_zero(v.cut), outliers=at_zero(v.outliers)) for v in rule.vectors)
        return replace(rule, vectors=tuple(vectors))

    return bare(one) == bare(other)


def find_edges(rule: TaskVectorMerge, keys: Sequence[int]) -> tuple[Edge, ...] | None:
    """Return the cuts of a rule that was made from thresholds with these distinct patterns, one for each statistic.

    None: a cut is made of something else, or a statistic serves no cut.
    """
    edges = []
    for i, vector in enumerate(rule.vectors):
        for cut, outliers in ((vector.cut, False), (vector.outliers, True)):
            if cut is None:
                continue
            if cut.key not in keys:
                return None
            edges.append(Edge(i, outliers, keys.index(cut.key)))
    return tuple(edges) if {edge.statistic for edge in edges} == set(range(len(keys))) else None


def lies_between(low: Cut, cut: Cut, high: Cut) -> bool:
    """Return whether a cut keeps all that the high one keeps, and nothing that the low one does not."""
    under = cut.key < high.key or (cut.key == high.key and cut.limit >= high.limit)
    over = cut.key > low.key or (cut.key == low.key and cut.limit <= low.limit)
    return under and over
