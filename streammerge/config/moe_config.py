"""A mixture of experts as a config: its models, and the description of the mixture itself."""

from __future__ import annotations

from streammerge.config.moe import KEYS_WITHOUT_EFFECT, is_moe, parse_moe
from streammerge.config.schema import MergeConfig, ModelSpec, config_of
from streammerge.config.wording import PATH_LIMIT
from streammerge.errors import printable

METHOD = "moe"
"""The name that stands in place of a merge method, in plans and manifests."""


def any_config_of(data: dict[str, object], text: str, where: str) -> MergeConfig:
    """Return the config of a merge or of a mixture of experts; see `config_of`."""
    return _moe_config(data, text, where) if is_moe(data) else config_of(data, text, where)


def _moe_config(data: dict[str, object], text: str, where: str) -> MergeConfig:
    where = printable(where, PATH_LIMIT)
    spec = parse_moe(data, f"{where}:")
    sources = {
        expert.reference: ModelSpec(expert.reference, path=expert.path) for expert in reversed(spec.every)
    }
    return MergeConfig(
        merge_method=METHOD,
        models=tuple(sources[reference] for reference in dict.fromkeys(e.reference for e in spec.every)),
        base_model=spec.base_model,
        dtype=spec.dtype,
        seed=spec.seed,
        text=text,
        where=where,
        moe=spec,
        notes=tuple(
            f"{where}: {key}: ignored: {KEYS_WITHOUT_EFFECT[key]}"
            for key in data
            if key in KEYS_WITHOUT_EFFECT
        ),
    )
