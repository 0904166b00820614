"""Quantised models in a merge whose codes are not decoded: these may only be copied, with their scales."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.quantization import Quantization
from streammerge.config.schema import MergeConfig
from streammerge.errors import ModelError, printable
from streammerge.formats.refs import SourceRef
from streammerge.methods.registry import Method


def check_codes(config: MergeConfig, method: Method, models: Iterable[TensorIndex]) -> None:
    """Refuse a merge of codes, which mean nothing with the scales of a different model.

    Raises
    ------
    ModelError
        If a model has codes, or scales of codes, that are not copied: by a `passthrough` of one model at a time, or
        by `exclude`.
    """
    one_by_one = all(len(part.sources) <= 1 for module in config.modules for part in module.slices)
    if method.name == "passthrough" and one_by_one:
        return
    excluded = [re.compile(pattern) for pattern in config.exclude]
    for model in models:
        found = model.quantization
        names = () if found is None else (*_in_order(model, found.codes), *_in_order(model, found.companions))
        for name in names:
            if found is not None and not any(pattern.search(name) for pattern in excluded):
                raise refusal(model, found, name)


def _in_order(model: TensorIndex, names: frozenset[str]) -> list[str]:
    return [name for name in model if name in names]


def refusal(model: TensorIndex, found: Quantization, name: str) -> ModelError:
    """Return the reason why a quantised model cannot take part, and the cure."""
    if name in found.bare:
        return ModelError(
            f"{printable(model.reference)}: tensor {printable(name)} holds {model[name].stored.dtype} codes without a scale "
            f"(quantisation: {printable(found.format, 60)}): the model is incomplete; download or copy it again"
        )
    what = "is quantised" if name in found.codes else "belongs to quantised tensors"
    return ModelError(
        f"{printable(model.reference)}: tensor {printable(name)} {what} (quantisation: {printable(found.format, 60)}, "
        f"{len(found.codes)} tensors), and codes cannot be merged yet: dequantise the model first (from_pretrained, "
        "dequantize(), save_pretrained), or use the weights that it was quantised from"
    )


def codes_of(indexes: Mapping[str, TensorIndex]) -> dict[str, frozenset[str]]:
    """Return the tensors of each quantised model that are either copied byte for byte or not used at all."""
    return {
        reference: index.quantization.codes | index.quantization.companions
        for reference, index in indexes.items()
        if index.quantization is not None
    }


def is_of_codes(codes: Mapping[str, frozenset[str]], reference: str, ref: SourceRef) -> bool:
    """Return whether a tensor of a model is quantised, or belongs to a quantised tensor."""
    return reference in codes and ref.stored.name in codes[reference]
