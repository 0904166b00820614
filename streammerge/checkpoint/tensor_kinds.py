"""The kind of a tensor, determined by its name."""

from __future__ import annotations

from typing import Literal

from streammerge.checkpoint.names import EMBEDDINGS, in_component, is_head

TensorKind = Literal["attention", "mlp", "norm", "embedding", "head", "other"]
_WORDS: tuple[tuple[TensorKind, tuple[str, ...]], ...] = (
    ("norm", ("norm", "ln_", "ln1", "ln2")),
    ("embedding", ("embed", "wte", "wpe")),
    ("attention", ("attn", "attention")),
    ("mlp", ("mlp", "ffn", "feed_forward", "feedforward", "expert", "moe", "intermediate", "densereludense")),
)
"""Words in a component of a name. Only the last module decides on a norm; otherwise the first kind found counts."""
_FEED_FORWARD = frozenset({"ff", "ff_context"})
"""Feed-forward modules in the transformer blocks of diffusers, which are inside ``attentions``."""


def kind_of(name: str) -> TensorKind:
    """Return the kind of a tensor.

    >>> kind_of("model.layers.0.self_attn.q_norm.weight"), kind_of("model.layers.0.self_attn.q_proj.weight")
    ('norm', 'attention')
    >>> kind_of("lm_head.weight"), kind_of("transformer.h.0.mlp.c_fc.bias"), kind_of("scale")
    ('head', 'mlp', 'other')
    >>> kind_of("unet/mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight")
    'mlp'
    """
    if is_head(name):
        return "head"
    if name.endswith(EMBEDDINGS):
        return "embedding"
    modules = in_component(name)[1].lower().split(".")[:-1]
    if not _FEED_FORWARD.isdisjoint(modules):
        return "mlp"
    for kind, words in _WORDS:
        some = modules[-1:] if kind == "norm" else modules
        if any(word in module for module in some for word in words):
            return kind
    return "other"
