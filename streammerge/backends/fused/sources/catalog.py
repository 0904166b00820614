"""The kernels by name: the function, its constants, and the number of elements that a program processes."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from streammerge.records import dataclass

from . import counts, decoding, fisher, merge, ranks, sums, votes

_BLOCK = 1024
_PARTS = 8


@dataclass(frozen=True)
class Kernel:
    """A function of this folder with values for its constants."""

    function: Any
    elements: int = _BLOCK
    """See `KernelSpec.elements`."""
    constants: dict[str, Any] = field(default_factory=lambda: {"BLOCK": _BLOCK})
    warps: int = 4
    """With 1, sums along a block need no instruction that is younger than PTX 7.0."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of its arguments, in order, without the constants."""
        return tuple(name for name in self.function.arg_names if name not in self.constants)


def _merge(elect: bool, ranked: bool) -> Kernel:
    constants = {"ELECT": elect, "RANKED": ranked, "BLOCK": _BLOCK}
    return Kernel(merge.task_vector_merge, constants=constants)


def _digits(bins: int) -> Kernel:
    constants = {"BINS": bins, "PARTS": _PARTS, "BLOCK": _BLOCK}
    return Kernel(counts.count_digits, _PARTS * _BLOCK, constants)


KERNELS = {
    "weighted_sum": Kernel(merge.weighted_sum),
    "task_vectors": _merge(False, False),
    "task_vectors_elect": _merge(True, False),
    "ranked_vectors": _merge(False, True),
    "ranked_vectors_elect": _merge(True, True),
    "sort_runs": Kernel(ranks.sort_runs, ranks.RUN.value, {"BLOCK": ranks.RUN.value, "TILE": 32}),
    "merge_runs": Kernel(ranks.merge_runs, 256, {"BLOCK": 256}),
    "ranked": Kernel(ranks.ranked, 256, {"BLOCK": 256}),
    "fisher_mean": Kernel(fisher.fisher_mean, constants={"VECTORS": False, "BLOCK": _BLOCK}),
    "fisher_mean_vectors": Kernel(fisher.fisher_mean, constants={"VECTORS": True, "BLOCK": _BLOCK}),
    "consensus": Kernel(votes.vote, constants={"AGREE": True, "BLOCK": _BLOCK}),
    "largest_agreeing": Kernel(votes.vote, constants={"AGREE": False, "BLOCK": _BLOCK}),
    "touched_merge": Kernel(votes.touched_merge),
    "touches": Kernel(votes.touches),
    "surviving": Kernel(sums.surviving),
    "pair_sums": Kernel(sums.lane_sums, 16, {"KIND": 0, "GROUPS": 16}),
    "abs_sums": Kernel(sums.lane_sums, 16, {"KIND": 1, "GROUPS": 16}),
    "wide_abs_sums": Kernel(sums.lane_sums, 16, {"KIND": 2, "GROUPS": 16}),
    "column_sums": Kernel(sums.column_sums, 128, {"BLOCK": 128}),
    "square_sums": Kernel(sums.square_sums, 16, {"GROUPS": 16}),
    "keys_in_window": Kernel(counts.keys_in_window),
    "ties_per_run": Kernel(counts.ties_per_run),
    "count_digits_11": _digits(2048),
    "count_digits_10": _digits(1024),
    "narrow_11": Kernel(counts.narrow, 1, {"BINS": 2048}, warps=1),
    "narrow_10": Kernel(counts.narrow, 1, {"BINS": 1024}, warps=1),
    "decode": Kernel(decoding.decode),
    "widen_codes": Kernel(decoding.widen_codes),
    "decode_integers": Kernel(decoding.decode_integers),
    "decode_twice_scaled": Kernel(decoding.decode_twice_scaled),
    "look_up": Kernel(decoding.look_up),
}

FOR_AMD = {
    **KERNELS,
    "count_digits_11": Kernel(counts.count_digits_at_once, constants={"BINS": 2048, "BLOCK": _BLOCK}),
    "count_digits_10": Kernel(counts.count_digits_at_once, constants={"BINS": 1024, "BLOCK": _BLOCK}),
}
"""What Triton compiles for AMD's GPUs: some kernels have a substitute, whose programs process fewer elements."""
