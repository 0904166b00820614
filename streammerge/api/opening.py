"""Opens what a config names: its models, and what lies beside them."""

from __future__ import annotations

from collections.abc import Callable

from streammerge.config.schema import MergeConfig
from streammerge.engine.fingerprint import check_belongs
from streammerge.index.fishers import FisherIndex
from streammerge.index.model import TensorIndex, open_model


def open_models(config: MergeConfig) -> tuple[list[TensorIndex], TensorIndex | None, list[TensorIndex]]:
    """Open every model once: those merged, the base, and the bases of slices where they are others."""
    opened: dict[str, TensorIndex] = {}

    def get(reference: str) -> TensorIndex:
        if reference not in opened:
            opened[reference] = open_model(reference)
        return opened[reference]

    models = [get(spec.reference) for spec in config.models]
    base = get(config.base_model) if config.base_model is not None else None
    others = {
        part.base.reference: get(part.base.reference)
        for module in config.modules for part in module.slices if part.base is not None
    }  # fmt: skip
    return models, base, [index for index in others.values() if index is not base]


def open_beside(
    key: str, open_store: Callable[[str], FisherIndex], config: MergeConfig, models: list[TensorIndex]
) -> list[FisherIndex]:
    """Open what lies beside each model under `key`; what was made for another model is refused."""
    stores = []
    for spec, model in zip(config.models, models, strict=True):
        reference = getattr(spec, key)
        if reference is None:
            return []  # refused with the other parameters, by name
        index = open_store(reference)
        check_belongs(index, model, "Fisher diagonal" if key == "fisher" else "store of Gram matrices")
        stores.append(index)
    return stores
