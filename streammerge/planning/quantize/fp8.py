"""`quantize: fp8`: DeepSeek's layout, for the weight matrices of the layers whose sides are multiples of 128.

vLLM, SGLang and transformers read it. They disagree on blocks that are cut short, so a matrix with such a side stays in
`dtype`, like embeddings, heads, norms, routers and biases; its module is named in `modules_to_not_convert`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from streammerge.checkpoint.names import flag_of, is_head
from streammerge.checkpoint.quantized.declarations import NOTHING
from streammerge.checkpoint.tensor_kinds import kind_of
from streammerge.dtypes import FLOATS
from streammerge.errors import ModelError
from streammerge.lazy import late_pattern
from streammerge.planning.job import Job
from streammerge.planning.quantize.base import Material, Storage, stores
from streammerge.planning.quantize.codes import copied_from, copies, named
from streammerge.tensors.encoders.base import NotWrittenError, encoder_like
from streammerge.tensors.encoders.fp8 import Fp8, in_blocks

SIDE = 128
"""Rows and columns of a block."""
_ROUTERS = frozenset({"gate", "router", "gating", "wg", "shared_expert_gate", "switch"})
"""Modules that send a token to its experts."""
_KEPT_KINDS = ("norm", "embedding", "head")
_TRANSPOSED = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types whose layers are stored as (in, out), a shape that no loader accepts for linear maps in FP8."""
_FUSED = late_pattern(r"(.*\.experts)\.(gate_up_proj|down_proj)")
"""The experts of a layer in one tensor, as transformers 5 names them."""


@stores("fp8")
def _choose(material: Material) -> Storage:
    jobs, template = material.jobs, material.template
    shapes = {job.name: job.shape for job in jobs}
    transposed = template.config.get("model_type") in _TRANSPOSED
    stored = [job if transposed else _stored(job, shapes) for job in jobs]
    if all(job.encoder is None for job in stored):
        raise ModelError(
            f"{material.config.where}: quantize: fp8 stores the matrices of layers whose sides are multiples of {SIDE}, and this "
            "model has none: leave `quantize` out"
        )
    kept = [_module(job.name) for job in stored if job.encoder is None and _is_matrix(job)]
    if flag_of(template.config) is True and not any(is_head(job.name) for job in jobs):
        kept.append("lm_head")  # tied: a loader would build an FP8 map from it
    declared: dict[str, Any] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [SIDE, SIDE],
    }
    if kept:
        declared["modules_to_not_convert"] = list(dict.fromkeys(kept))
    written = [one for job in stored for one in _written(job, material)]
    return Storage(tuple(replace(job, ordinal=i) for i, job in enumerate(written)), declared)


def _written(job: Job, material: Material) -> list[Job]:
    """Return the jobs that write a tensor; a copied tensor already in this layout is copied code by code."""
    source = copied_from(job, material) if isinstance(job.encoder, Fp8) else None
    if source is None or not isinstance(job.encoder, Fp8):
        return [job]
    try:
        own = encoder_like(source, lambda stored: named(source, job.name, stored), NOTHING)
    except NotWrittenError:
        return [job]
    return copies(source, job.name, material) if own == job.encoder else [job]


def _stored(job: Job, shapes: Mapping[str, tuple[int, ...]]) -> Job:
    """Return a job with its encoder, if its tensor is stored in FP8."""
    if not _is_matrix(job) or not (_is_of_layer(job.name, job.shape) or _is_fused(job.name, shapes)):
        return job
    if any(side % SIDE or not side for side in job.shape[-2:]):
        return job
    return replace(job, dtype="F32", encoder=in_blocks(job.name, job.shape, (SIDE, SIDE)))


def _is_matrix(job: Job) -> bool:
    return job.dtype in FLOATS and len(job.shape) >= 2


def _module(name: str) -> str:
    fused = _FUSED.fullmatch(name)
    return fused[1] if fused else name.removesuffix(".weight")


def _is_of_layer(name: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor is the weight of a linear map of a layer, and no router.

    >>> _is_of_layer("model.layers.0.mlp.up_proj.weight", (8, 8)), _is_of_layer("model.layers.0.mlp.gate.weight", (8, 8))
    (True, False)
    """
    modules = name.split(".")[:-1]
    return (
        len(shape) == 2
        and name.endswith(".weight")
        and any(part.isdigit() for part in modules)
        and not _ROUTERS.intersection(modules)
        and kind_of(name) not in _KEPT_KINDS
    )


def _is_fused(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether a tensor holds a layer's experts as transformers stores them in FP8: (out, in), without biases."""
    fused = _FUSED.fullmatch(name)
    if fused is None or f"{fused[1]}.gate_up_proj_bias" in shapes:
        return False
    up, down = (shapes.get(f"{fused[1]}.{end}", ()) for end in ("gate_up_proj", "down_proj"))
    if len(up) != 3 or len(down) != 3:
        return False
    width, inner = down[1:]
    return up == (down[0], 2 * inner, width) and inner % SIDE == 0
