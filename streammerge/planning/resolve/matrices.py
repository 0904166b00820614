"""Decide which tensors a method of whole matrices decomposes, and what it reads of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from streammerge.checkpoint.tensor_kinds import kind_of
from streammerge.config.matrices import Matrices
from streammerge.config.schema import MergeConfig
from streammerge.errors import ConfigError, printable
from streammerge.formats.refs import SourceRef
from streammerge.lazy import late_pattern
from streammerge.methods.registry import Method, all_methods
from streammerge.planning.job import Job
from streammerge.planning.needs import layer_of
from streammerge.planning.resolve.assemble import OutputTensor

_EXPERTS = late_pattern(r"(^|\.)(\w+_)?experts?\.")
"""Modules whose three-dimensional tensors hold one matrix per expert."""
_OUTSIDE = ("embedding", "head", "norm")


def check_matrices(config: MergeConfig, method: Method) -> None:
    """Refuse `matrices` and `rest` for a method that does not decompose matrices."""
    if config.matrices.given and not method.matrices:
        takers = ", ".join(name for name, one in all_methods().items() if one.matrices)
        raise ConfigError(
            f"{config.matrices.given[0]}: {method.name!r} treats all tensors alike: remove it, or use one of {takers}"
        )


def matrix_of(
    matrices: Matrices, name: str, shape: Sequence[int], stacks: Mapping[str, int]
) -> tuple[int, int] | None:
    """Return the shape of the matrices that a tensor consists of; None if it is merged as the rest.

    >>> layers = {"layers": 2}
    >>> matrix_of(Matrices(), "layers.1.mlp.up_proj.weight", (8, 4), layers)
    (8, 4)
    >>> matrix_of(Matrices(), "layers.1.mlp.experts.down_proj", (16, 8, 4), layers)
    (8, 4)
    >>> matrix_of(Matrices(), "embed_tokens.weight", (100, 4), layers), matrix_of(Matrices("embed"), "embed.weight", (9, 4), {})
    (None, (9, 4))
    """
    if not 2 <= len(shape) <= 3:
        return None
    if matrices.pattern is not None:
        if re.search(matrices.pattern, name) is None:
            return None
    elif (
        layer_of(name, stacks)[0] is None
        or kind_of(name) in _OUTSIDE
        or (len(shape) == 3 and _EXPERTS.search(name) is None)
    ):
        return None
    return shape[-2], shape[-1]


def read_as_deltas(sources: Sequence[SourceRef], base: SourceRef | None) -> tuple[SourceRef, ...]:
    """Return the sources, those that are adapters of the base itself as the adapters' own differences."""
    if base is None:
        return tuple(sources)
    return tuple(ref.delta_from(base) or ref for ref in sources)


def notes_on(
    jobs: Sequence[Job], config: MergeConfig, method: Method, outputs: Sequence[OutputTensor]
) -> list[str]:
    """Return a note if a method of matrices finds none; refuse a pattern that matches no matrix.

    Raises
    ------
    ConfigError
        If `matrices` matches no tensor.
    """
    if not method.matrices or any(job.matrix for job in jobs):
        return []
    if config.matrices.pattern is None:
        return [
            f"no tensor is a matrix of a layer, so {method.name!r} merges all of them as the rest: name them with `matrices: RE`"
        ]
    first = printable(outputs[0].name, 120) if outputs else "none"
    raise ConfigError(
        f"{config.matrices.given[0]}: it occurs in the name of no tensor with 2 or 3 axes that is merged (the first tensor is {first})"
    )
