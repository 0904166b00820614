"""Parameters with the matrices of several experts in one tensor: which of them an adapter can hold, and how PEFT nests them.

PEFT gives a parameter factors if `target_parameters` names it, and wraps its module once for each, in the order in which
transformers declares them. Names of factors count the wrappers around their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from streammerge.algebra.low_rank import computed_rank
from streammerge.checkpoint.adapters.experts import IN_ORDER, are_in_out
from streammerge.config.lora import LoraOutput
from streammerge.errors import ModelError, printable
from streammerge.tensors.encoders.low_rank import LowRank


def check_parameter(name: str, shape: Sequence[int]) -> None:
    """Refuse a tensor of several experts that PEFT cannot give factors.

    Raises
    ------
    ModelError
        If it is none of the parameters that transformers fuses.
    """
    if name.rpartition(".")[2] not in IN_ORDER or len(shape) > 3 or 0 in shape or shape[0] < 2:
        raise ModelError(
            f"tensor {printable(name)} holds the matrices of several experts in a way that PEFT does not know: leave them out "
            "with `exclude: experts` (--exclude experts)"
        )


def depth_of(name: str, parameters: Sequence[str]) -> int:
    """Return the number of wrappers around that of a parameter: one for each that is declared later.

    >>> depth_of("experts.gate_up_proj", ["experts.down_proj", "experts.gate_up_proj"])
    1
    """
    module, _, leaf = name.rpartition(".")
    others = (other.rpartition(".") for other in parameters)
    return sum(of == module and IN_ORDER.index(one) > IN_ORDER.index(leaf) for of, _, one in others)


def form_of(
    name: str, shape: Sequence[int], asked: LoraOutput, dtype: str, settings: Mapping[str, Any]
) -> LowRank:
    """Return the form of a parameter; biases of experts are one matrix, and keep their full rank."""
    matrix = shape[-2], shape[-1]
    whole = len(shape) == 2
    rank = (
        asked.most
        if asked.rank is not None and not whole
        else min(matrix if whole else (asked.most, *matrix))
    )
    turned = not whole and are_in_out(settings)
    return LowRank(
        name, matrix, rank, None, dtype, computed_rank(matrix, rank), turned, math.prod(shape[:-2])
    )
