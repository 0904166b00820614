"""Rules: the arithmetic on every element once the statistics are known, as formulas in torch.

A rule is a frozen value. Called on fp32 blocks it is the reference implementation and the GPU path. The CPU backend
has a fused kernel for each built-in rule; tests hold it to the same bits. Sums over models run in fp64, in configured
order, with separate multiplication and addition; the fp64 result is rounded once, to the output's dtype.
"""

from __future__ import annotations

from streammerge.algebra.rules.balanced_merge import BalancedMerge
from streammerge.algebra.rules.base import Inputs, Rule, ranked, removing, vectors_of
from streammerge.algebra.rules.combinations import ColumnCombination, RowCombination
from streammerge.algebra.rules.consensus_merge import ConsensusMerge
from streammerge.algebra.rules.fisher_mean import FisherMean
from streammerge.algebra.rules.formula import Formula
from streammerge.algebra.rules.largest_agreeing import LargestAgreeing
from streammerge.algebra.rules.matrix_merge import MatrixMerge
from streammerge.algebra.rules.regression_mean import ROWS_AT_ONCE, RegressionMean
from streammerge.algebra.rules.scaled import Scaled, scaled
from streammerge.algebra.rules.selected_merge import SelectedMerge
from streammerge.algebra.rules.sums import CopyOf, WeightedSum
from streammerge.algebra.rules.task_vector_merge import TaskVectorMerge
from streammerge.algebra.rules.touched_merge import TouchedMerge, touched_entries

__all__ = [
    "ROWS_AT_ONCE",
    "BalancedMerge",
    "ColumnCombination",
    "ConsensusMerge",
    "CopyOf",
    "FisherMean",
    "Formula",
    "Inputs",
    "LargestAgreeing",
    "MatrixMerge",
    "RegressionMean",
    "RowCombination",
    "Rule",
    "Scaled",
    "SelectedMerge",
    "TaskVectorMerge",
    "TouchedMerge",
    "WeightedSum",
    "ranked",
    "removing",
    "scaled",
    "touched_entries",
    "vectors_of",
]
