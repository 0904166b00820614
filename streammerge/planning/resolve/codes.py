"""Detect whether an output holds quantised weights: codes, recognised by their scales."""

from __future__ import annotations

import re
from collections.abc import Sequence

from streammerge.lazy import late_pattern
from streammerge.planning.job import Job

_PLAIN = ("F64", "F32", "F16", "BF16", "I64", "U64", "BOOL", "C64")
"""Dtypes that never hold codes."""
_COMPANION = late_pattern(
    r"(?:weight_)?scales?(?:_.*)?|qzeros|zeros|g_idx|SCB|absmax|quant_map|weight_(?:shape|zero_point|global_scale)",
    re.ASCII,
)
"""Names of the tensors that decode a module's codes."""


def holds_codes(jobs: Sequence[Job]) -> bool:
    """Return whether some tensor of an output holds codes: an integer or byte dtype, and scales for it.

    Names do not matter: a buffer of integers (positions, masks) has no scales, and codes have some.
    """
    names = {job.name for job in jobs}
    described = {name.rpartition(".")[0] for name in names if _COMPANION.fullmatch(name.rpartition(".")[2])}
    return any(
        job.dtype not in _PLAIN and job.n_elements > 1 and _is_described(job.name, names, described)
        for job in jobs
    )


def _is_described(name: str, names: set[str], described: set[str]) -> bool:
    """Return whether there are scales for a tensor: its name plus a suffix, or its name with a different ending."""
    stem = name.removesuffix("_blocks")
    return (
        name.rpartition(".")[0] in described
        or name in described
        or any(
            f"{stem}{end}" in names for end in ("_scales", "_scale", "_scale_inv") if f"{stem}{end}" != name
        )
    )
