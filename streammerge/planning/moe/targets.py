"""The architectures that a mixture of experts can have, with their tensor names and settings.

A new architecture is one `Target` in `TARGETS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from streammerge.config.moe import MoeSpec
from streammerge.config.wording import child, refuse, shown
from streammerge.records import dataclass

PARTS = ("gate_proj", "up_proj", "down_proj")
"""The weights of an expert: [intermediate, hidden] twice, and [hidden, intermediate]."""
_ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
_LAYER = frozenset(
    {"input_layernorm.weight", "post_attention_layernorm.weight", *(f"{a}.weight" for a in _ATTENTION)}
)
QKV_BIASES = tuple(f"self_attn.{part}_proj.bias" for part in "qkv")
_BIASES = frozenset((*QKV_BIASES, "self_attn.o_proj.bias"))


@dataclass(frozen=True)
class Sizes:
    """The sizes of a mixture."""

    experts: int
    intermediate: int
    """Rows of an expert's gate projection."""
    shared: int
    """The same of the shared expert; 0 without one."""


Settings = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """An architecture of mixtures."""

    title: str
    aliases: frozenset[str]
    """Its names in a config, in lower case, without blanks, hyphens and underscores."""
    families: tuple[str, ...]
    """The dense architectures that it can be built from."""
    class_name: str
    """The class that loads it."""
    model_type: str
    layer: frozenset[str]
    """The tensors of a layer that come from the base, without the prefix ``model.layers.N.``."""
    gate: Mapping[str, str]
    """The name of a layer's gate, by the value of `expert_names`."""
    expert: str
    """The name of an expert's weight stored one by one, with ``{expert}`` and ``{part}``."""
    parts: Mapping[str, str]
    """The name of each weight, by its name in a dense model."""
    settings: Callable[[Settings, MoeSpec, Sizes], Settings]
    """Function that returns the settings of config.json that describe the mixture."""
    fused: bool = True
    """Whether transformers reads its experts in fused form."""
    shared: tuple[int, int] = (0, 0)
    """Fewest and most shared experts."""
    shared_expert: str = ""
    """The name of a shared expert's weight, with ``{part}``."""
    shared_gate: str = ""
    """The name of the shared expert's gate; empty if it has none."""
    zero_biases: tuple[str, ...] = ()
    """Biases that it needs and that are zero where the base has none."""

    @property
    def required(self) -> frozenset[str]:
        """The tensors of a layer that the base must have: all but biases."""
        return frozenset(name for name in self.layer if not name.endswith(".bias"))


def _plain(parts: Mapping[str, str] | None = None) -> Mapping[str, str]:
    return parts or {part: part for part in PARTS}


def _mixtral(settings: Settings, spec: MoeSpec, sizes: Sizes) -> Settings:
    return {
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": spec.per_token,
        "intermediate_size": sizes.intermediate,
        "sliding_window": settings.get("sliding_window"),
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def _qwen(settings: Settings, spec: MoeSpec, sizes: Sizes) -> Settings:
    return {
        "num_experts": sizes.experts,
        "num_experts_per_tok": spec.per_token,
        "moe_intermediate_size": sizes.intermediate,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def _qwen2(settings: Settings, spec: MoeSpec, sizes: Sizes) -> Settings:
    found = {
        **_qwen(settings, spec, sizes),
        "qkv_bias": True,
        "shared_expert_intermediate_size": sizes.shared,
    }
    n, first = settings.get("num_hidden_layers"), settings.get("max_window_layers", 28)
    asked = settings.get("use_sliding_window") and not settings.get("layer_types")
    if asked and type(n) is int and type(first) is int:
        # Qwen2-MoE's default is a different selection of layers.
        found["layer_types"] = ["sliding_attention" if i >= first else "full_attention" for i in range(n)]
    return found


def _deepseek(settings: Settings, spec: MoeSpec, sizes: Sizes) -> Settings:
    code = "deepseek-ai/deepseek-moe-16b-base"
    rope = settings.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, dict) else None
    return {
        "n_routed_experts": sizes.experts,
        "n_shared_experts": 1 if sizes.shared else None,
        "num_experts_per_tok": spec.per_token,
        "moe_intermediate_size": sizes.intermediate,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "rope_theta": settings.get("rope_theta", theta),
        "auto_map": {
            "AutoConfig": f"{code}--configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{code}--modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{code}--modeling_deepseek.DeepseekForCausalLM",
        },
    }


_QWEN_GATE = {"classic": "mlp.gate.weight", "fused": "mlp.gate.weight"}
_QWEN_EXPERT = "mlp.experts.{expert}.{part}.weight"
TARGETS = (
    Target(
        "Mixtral",
        frozenset({"mixtral"}),
        ("llama", "mistral"),
        "MixtralForCausalLM",
        "mixtral",
        _LAYER,
        {"classic": "block_sparse_moe.gate.weight", "fused": "mlp.gate.weight"},
        "block_sparse_moe.experts.{expert}.{part}.weight",
        {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
        _mixtral,
    ),
    Target(
        "DeepSeek",
        frozenset({"deepseek", "deepseekmoe"}),
        ("llama", "mistral"),
        "DeepseekForCausalLM",
        "deepseek",
        _LAYER | _BIASES,
        _QWEN_GATE,
        _QWEN_EXPERT,
        _plain(),
        _deepseek,
        fused=False,
        shared=(0, 1),
        shared_expert="mlp.shared_experts.{part}.weight",
    ),
    Target(
        "Qwen2-MoE",
        frozenset({"qwen", "qwenmoe", "qwen2", "qwen2moe"}),
        ("qwen2", "llama", "mistral"),
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        _LAYER | frozenset(QKV_BIASES),
        _QWEN_GATE,
        _QWEN_EXPERT,
        _plain(),
        _qwen2,
        shared=(1, 1),
        shared_expert="mlp.shared_expert.{part}.weight",
        shared_gate="mlp.shared_expert_gate.weight",
        zero_biases=QKV_BIASES,
    ),
    Target(
        "Qwen3-MoE",
        frozenset({"qwen3", "qwen3moe"}),
        ("qwen3",),
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        _LAYER | _BIASES | {"self_attn.q_norm.weight", "self_attn.k_norm.weight"},
        _QWEN_GATE,
        _QWEN_EXPERT,
        _plain(),
        _qwen,
    ),
)
"""The architectures; the first that fits the base and the shared experts is the default."""


def choose_target(spec: MoeSpec, family: str, where: str) -> Target:
    """Return the architecture of a mixture.

    Raises
    ------
    ConfigError
        If there is none by that name, or it cannot be built from the base, or with so many shared experts.
    """
    place = child(f"{where}:", "architecture")
    named = _named(spec.architecture, place)
    fitting = [target for target in named if family in target.families]
    if not fitting:
        known = " or ".join(named[0].families)
        refuse(
            place,
            f"{named[0].title} is built from a base of type {known}, not {shown(family)}: choose a different one",
        )
    n = len(spec.shared)
    suiting = [target for target in fitting if target.shared[0] <= n <= target.shared[1]]
    if not suiting:
        _refuse_shared(fitting[0], n, family, where)
    return suiting[0]


def _refuse_shared(target: Target, n: int, family: str, where: str) -> NoReturn:
    least, most = target.shared
    wanted = f"exactly {least}" if least == most and least else f"at most {most}" if most else "none"
    names = " or ".join(t.title for t in TARGETS if family in t.families and t.shared[0] <= n <= t.shared[1])
    other = f", or set `architecture` to {names}" if names else ""
    refuse(
        child(f"{where}:", "shared_experts"),
        f"{target.title} takes {wanted}, the config has {n}: "
        + (f"list one{other}" if n < least else f"remove {'some' if most else 'them'}{other}"),
    )


def _named(architecture: str | None, place: str) -> list[Target]:
    if architecture is None:
        return list(TARGETS)
    word = re.sub(r"[\s_-]|forcausallm$", "", architecture.lower())
    found = [target for target in TARGETS if word in target.aliases]
    if not found:
        known = ", ".join(target.title for target in TARGETS)
        refuse(place, f"unknown architecture {shown(architecture)} (known: {known})")
    return found
