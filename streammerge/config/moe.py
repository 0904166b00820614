"""The config of a mixture of experts: the YAML of mergekit-moe, read strictly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast, get_args

from streammerge.config.references import parse_base, parse_reference, parse_text
from streammerge.config.values import parse_dtype, parse_seed
from streammerge.config.wording import check_keys, child, refuse, shown, suggestion
from streammerge.records import dataclass

GateMode = Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"]
ExpertNames = Literal["classic", "fused"]

KEYS = (
    "base_model",
    "experts",
    "shared_experts",
    "gate_mode",
    "dtype",
    "experts_per_token",
    "architecture",
    "expert_names",
    "seed",
)
"""Keys of the config; the last two are not mergekit's."""
KEYS_WITHOUT_EFFECT: Mapping[str, str] = {
    "name": "it names a stage of mergekit-multi; the command line names the output",
    "out_path": "the command line names the output",
    "tokenizer_source": "the tokenizer is that of the base, as in mergekit-moe",
    "parameters": "a mixture has none: experts have `noise_scale` and `residual_scale`",
}
"""Keys of published configs that mergekit-moe ignores, with the reason."""
EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
"""Keys of an expert."""
MOST_EXPERTS = 1024
"""Most experts; routers of published models have at most a few hundred."""
_MOST_PROMPTS = 10_000
RANDOM = ("random", "uniform_random")
"""Modes whose gates depend on the seed only."""
HIDDEN = ("hidden", "hidden_avg", "hidden_last")
"""Modes whose gates are hidden states of the base model."""


@dataclass(frozen=True)
class ExpertSpec:
    """One entry of `experts` or of `shared_experts`."""

    reference: str
    """The model whose MLPs become the expert."""
    positive: tuple[str, ...] = ()
    """Prompts that are to be routed to the expert."""
    negative: tuple[str, ...] = ()
    """Prompts that are not to be routed to it."""
    noise: float = 0.0
    """Standard deviation of normal noise that is added to its weights."""
    scale: float = 1.0
    """Factor of its output: of the weights of its down projection."""
    path: str = ""
    """Its place in the config, for messages: ``moe.yml: experts[0]``."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """All its prompts."""
        return (*self.positive, *self.negative)


@dataclass(frozen=True)
class MoeSpec:
    """A mixture of experts."""

    base_model: str
    experts: tuple[ExpertSpec, ...]
    shared: tuple[ExpertSpec, ...] = ()
    """Experts that see every token."""
    gate_mode: GateMode = "hidden"
    per_token: int = 2
    """Number of experts that a token is routed to."""
    architecture: str | None = None
    """The architecture that the config asks for; None: it follows from the base model."""
    names: ExpertNames = "classic"
    """Whether experts are stored one by one, or fused as transformers 5 holds them."""
    dtype: str | None = None
    seed: int = 0

    @property
    def every(self) -> tuple[ExpertSpec, ...]:
        """All experts, shared ones last."""
        return (*self.experts, *self.shared)

    @property
    def reads_prompts(self) -> bool:
        """Whether the gates are computed from prompts."""
        return self.gate_mode not in RANDOM

    @property
    def runs_base(self) -> bool:
        """Whether the gates are hidden states of the base model."""
        return self.gate_mode in HIDDEN

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn."""
        return not self.reads_prompts or any(expert.noise for expert in self.every)


def is_moe(data: Mapping[str, object]) -> bool:
    """Return whether a config describes a mixture of experts rather than a merge."""
    return "experts" in data and "merge_method" not in data


def parse_moe(data: Mapping[str, object], top: str) -> MoeSpec:
    """Return the mixture that a map of plain values describes; `top` is its place in messages.

    Raises
    ------
    ConfigError
        If something in it is wrong; the message names it.
    """
    check_keys(data, top, (*KEYS, *KEYS_WITHOUT_EFFECT))
    if data.get("base_model") is None:
        refuse(top, "'base_model' is missing: the model that everything but the MLPs comes from")
    base, _ = parse_base(data["base_model"], child(top, "base_model"))
    experts = _experts(data.get("experts"), child(top, "experts"))
    if not experts:
        refuse(child(top, "experts"), "must be a list of experts (- source_model: …), not an empty list")
    shared = _experts(data.get("shared_experts") or [], child(top, "shared_experts"))
    spec = MoeSpec(
        base_model=base,
        experts=experts,
        shared=shared,
        gate_mode=cast(GateMode, _one_of(data, "gate_mode", get_args(GateMode), "hidden", top)),
        per_token=_per_token(data.get("experts_per_token", 2), len(experts), child(top, "experts_per_token")),
        architecture=_architecture(data.get("architecture"), child(top, "architecture")),
        names=cast(ExpertNames, _one_of(data, "expert_names", get_args(ExpertNames), "classic", top)),
        dtype=parse_dtype(data.get("dtype"), child(top, "dtype")),
        seed=parse_seed(data.get("seed", 0), child(top, "seed")),
    )
    if spec.reads_prompts:
        _check_prompts(spec)
    return spec


def _experts(data: object, path: str) -> tuple[ExpertSpec, ...]:
    if not isinstance(data, list):
        refuse(path, f"must be a list of experts (- source_model: …), not {shown(data)}")
    if len(data) > MOST_EXPERTS:
        refuse(path, f"{len(data)} experts, at most {MOST_EXPERTS}")
    return tuple(_expert(item, f"{path}[{i}]") for i, item in enumerate(data))


def _expert(data: object, path: str) -> ExpertSpec:
    if not isinstance(data, dict):
        refuse(path, f"must be a map (source_model: …), not {shown(data)}")
    check_keys(data, path, EXPERT_KEYS)
    if data.get("source_model") is None:
        refuse(path, "'source_model' is missing")
    noise = _number(data.get("noise_scale"), child(path, "noise_scale"), 0.0)
    if noise < 0:
        refuse(child(path, "noise_scale"), f"must be 0 or more, not {shown(noise)}")
    return ExpertSpec(
        reference=parse_reference(data["source_model"], child(path, "source_model")),
        positive=_prompts(data.get("positive_prompts"), child(path, "positive_prompts")),
        negative=_prompts(data.get("negative_prompts"), child(path, "negative_prompts")),
        noise=noise,
        scale=_number(data.get("residual_scale"), child(path, "residual_scale"), 1.0),
        path=path,
    )


def _prompts(data: object, path: str) -> tuple[str, ...]:
    if data is None:
        return ()
    if not isinstance(data, list):
        refuse(path, f'must be a list of prompts (- "…"), not {shown(data)}')
    if len(data) > _MOST_PROMPTS:
        refuse(path, f"{len(data)} prompts, at most {_MOST_PROMPTS}")
    for i, item in enumerate(data):
        if not isinstance(item, str):
            refuse(f"{path}[{i}]", f"must be a text, not {shown(item)} (quote it)")
    return tuple(str(item) for item in data)


def _number(value: object, path: str, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        refuse(path, f"must be a number, not {shown(value)}")
    return float(value)


def _per_token(value: object, n: int, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        refuse(path, f"must be a whole number of 1 or more, not {shown(value)}")
    if value > n:
        refuse(
            path,
            f"a token is routed to {value} experts, but there are only {n}: list more experts, or lower it",
        )
    return value


def _architecture(value: object, path: str) -> str | None:
    return None if value is None else parse_text(value, path)


def _one_of(data: Mapping[str, object], key: str, known: Sequence[str], default: str, top: str) -> str:
    value = data.get(key)
    if value is None:
        return default
    if not isinstance(value, str) or value not in known:
        cure = suggestion(value, known) if isinstance(value, str) else f"known: {', '.join(known)}"
        refuse(child(top, key), f"unknown value {shown(value)} ({cure})")
    return value


def _check_prompts(spec: MoeSpec) -> None:
    """Refuse experts that the gates could not tell apart: without prompts, or with the prompts of a different one."""
    seen: dict[tuple[tuple[str, ...], tuple[str, ...]], ExpertSpec] = {}
    for expert in spec.experts:
        if not expert.positive:
            refuse(
                expert.path,
                f"'positive_prompts' is missing, which gate_mode '{spec.gate_mode}' needs: list prompts, or use gate_mode "
                "'random'",
            )
        first = seen.setdefault((expert.positive, expert.negative), expert)
        if first is not expert:
            refuse(
                expert.path,
                f"has the prompts of {first.path.rpartition(' ')[2]}, so both would get the same gate: change them",
            )
