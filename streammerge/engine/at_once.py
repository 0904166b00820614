"""Outputs of a piece that differ only in the scale of the same sum of task vectors are computed together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from streammerge.algebra.block import Applied, BlockMath, Operand, ScalingMath
from streammerge.algebra.rules import Rule
from streammerge.engine.worker import Worker


def together(rules: Mapping[Worker, Rule], most: int) -> Iterator[dict[Worker, Rule]]:
    """Yield the outputs in groups of at most `most` that can be computed together."""
    groups: dict[object, list[Worker]] = {}
    for output, rule in rules.items():
        groups.setdefault(output if rule.unscaled is None else rule.unscaled, []).append(output)
    for group in groups.values():
        for first in range(0, len(group), most):
            yield {output: rules[output] for output in group[first : first + most]}


def apply_together(math: BlockMath, rules: Sequence[Rule], outs: Sequence[Operand]) -> list[Applied]:
    """Apply the rules of a group to the same block, each into its own output."""
    if len(rules) == 1:
        return [math.apply(rules[0], outs[0])]
    return cast(ScalingMath, math).apply_scaled(
        rules, outs
    )  # groups are planned only where kernels are compiled
