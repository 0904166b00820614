"""`quantize: same`: every tensor that is quantised in the base (or first model) is stored in the same format.

Copied tensors are copied code by code; merged tensors are encoded again. Scales of activations are copied along.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.quantized.declarations import DECLARATIONS, declaration_of
from streammerge.errors import ConfigError, ModelError, printable
from streammerge.formats.refs import SourceRef
from streammerge.planning.job import Job
from streammerge.planning.quantize.base import Material, Storage, stores
from streammerge.planning.quantize.codes import copied_from, copies, copy_job, decoded, named
from streammerge.planning.resolve.jobs import Lender
from streammerge.tensors.encoders.base import Encoder, NotWrittenError, encoder_like

_CURE = "set `quantize: none` or `quantize: fp8`"


@stores("same")
def _choose(material: Material) -> Storage:
    template = material.template
    if template.quantization is None and not any(lender.ref.stored_format for lender in material.lenders):
        raise ConfigError(
            f"{material.config.where}: quantize: same stores the output as {printable(template.reference)} is stored, which is "
            "not quantised: leave `quantize` out, or set it to fp8"
        )
    jobs: list[Job] = []
    for job, lender in zip(material.jobs, material.lenders, strict=True):
        jobs += [job] if lender.ref.stored_format is None else _stored(job, lender, material)
    jobs += _carried(material)
    return Storage(tuple(replace(job, ordinal=i) for i, job in enumerate(jobs)), keeps=True)


def _stored(job: Job, lender: Lender, material: Material) -> list[Job]:
    """Return the jobs that write a tensor in its lender's format: copies of its parts, or one job with an encoder."""
    inner = decoded(lender.ref)
    if inner is None or inner.shape != job.shape:
        raise _refused(job, lender, "has another shape in the output, so that its codes cannot be stored")
    _check_declared(job, lender, material)
    source = copied_from(job, material)
    if source is not None and (source == inner or _alike(source, inner, job.name, material, lender)):
        return copies(source, job.name, material)
    try:
        encoder = _encoder(inner, job.name, material.indexes[lender.reference])
    except NotWrittenError as error:
        raise _refused(job, lender, f"is stored in a format that is read and not written ({error})") from None
    return [replace(job, dtype="F32", encoder=encoder)]


def _refused(job: Job, lender: Lender, why: str) -> ModelError:
    return ModelError(
        f"{printable(lender.reference)}: quantize: same: tensor {printable(job.name)} {why}: {_CURE}"
    )


def _alike(source: SourceRef, inner: SourceRef, name: str, material: Material, lender: Lender) -> bool:
    """Return whether the codes of a different model's tensor have the same meaning in the output as in that model."""
    index = material.indexes[lender.reference]
    try:
        return type(source) is type(inner) and _encoder(source, name, index) == _encoder(inner, name, index)
    except NotWrittenError:
        return False


def _encoder(ref: SourceRef, name: str, index: TensorIndex) -> Encoder:
    return encoder_like(ref, lambda stored: named(ref, name, stored), declaration_of(index.config))


def _check_declared(job: Job, lender: Lender, material: Material) -> None:
    """Refuse a layer from a model whose quantisation is declared differently from the output's config.json."""
    index, template = material.indexes[lender.reference], material.template
    if index is not template and _declarations(index) != _declarations(template):
        raise _refused(job, lender, f"is stored otherwise than {printable(template.reference)} declares")


def _declarations(index: TensorIndex) -> list[object]:
    return [index.config.get(key) for key in DECLARATIONS]


def _carried(material: Material) -> Iterator[Job]:
    """Yield copies of the activation scales and stored shapes of each layer whose weights the output has."""
    layers: dict[tuple[str, str], dict[str, None]] = {}
    for job, lender in zip(material.jobs, material.lenders, strict=True):
        layers.setdefault((lender.reference, layer_of(lender.name)), {})[layer_of(job.name)] = None
    done: set[str] = set()
    of_model = {
        reference: _by_layer(material.indexes[reference]) for reference in dict.fromkeys(r for r, _ in layers)
    }
    for (reference, layer), outputs in layers.items():
        for ref in of_model[reference].get(layer, ()):
            for renamed in (output + ref.name[len(layer) :] for output in outputs):
                if renamed not in done:
                    done.add(renamed)
                    yield copy_job(ref, renamed)


def _by_layer(index: TensorIndex) -> dict[str, list[SourceRef]]:
    """Return the tensors of a model that are copied along, by layer."""
    decoding = {part.name for ref in index.values() if ref.stored_format for part in _decoded_parts(ref)}
    beside = (ref for name, ref in index.coded.items() if name not in decoding)
    carried: dict[str, list[SourceRef]] = {}
    for ref in (*index.activations.values(), *beside):
        carried.setdefault(layer_of(ref.name), []).append(ref)
    return carried


def _decoded_parts(ref: SourceRef) -> tuple[SourceRef, ...]:
    inner = decoded(ref)
    return () if inner is None else inner.parts


def layer_of(name: str) -> str:
    """Return the beginning of a name, up to its first number; empty if it has none.

    >>> layer_of("model.layers.3.self_attn.k_scale"), layer_of("lm_head.weight")
    ('model.layers.3', '')
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])
