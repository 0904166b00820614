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
_NETWORK_RESERVE = 520 << 20
"""Bytes that the process needs where it has run a model: the interpreter, torch, transformers and the kernels."""
_NOISE = 64 << 20
"""Bytes that torch's temporaries take in all threads while noise is drawn, in addition to the counted ones."""


def reserve_for(spec: MoeSpec) -> int:
    """Return the bytes that the process needs for the gates and random numbers of a mixture."""
    noise = _NOISE if any(expert.noise for expert in spec.every) else 0
    if spec.reads_prompts:
        return _NETWORK_RESERVE + noise
    return TORCH.reserve + noise if spec.draws else 0
