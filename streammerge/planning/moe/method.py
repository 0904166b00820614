"""What stands in place of a merge method in the plan of a mixture of experts, whose tensors are all copies."""

from __future__ import annotations

from streammerge.algebra.extent import Extent
from streammerge.backends.torch.backend import TORCH
from streammerge.config.moe import MoeSpec
from streammerge.config.moe_config import METHOD
from streammerge.methods.declaration import Method
from streammerge.methods.papers.passthrough import passthrough

MOE = Method(
    METHOD,
    passthrough,
    Extent.ELEMENT,
    "template",
    (1, None),
    {},
    text="Make a mixture of experts of dense models.",
)
NETWORK_RESERVE = 480 << 20
"""Bytes that the process needs where it has run a model: the interpreter, torch, transformers and the kernels."""


def reserve_for(spec: MoeSpec) -> int:
    """Return the bytes that the process needs for the gates and random numbers of a mixture."""
    if spec.reads_prompts:
        return NETWORK_RESERVE
    return TORCH.reserve if spec.draws else 0
