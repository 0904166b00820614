"""Names of tensors, and of the settings that concern them. No other file lists names that architectures use."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from streammerge.lazy import late_pattern

LANGUAGE_PARTS = ("text_config", "llm_config", "language_config")
"""Entries of config.json for the language model within a larger model."""
TIED = "tie_word_embeddings"
"""The setting of config.json that makes the embedding the output head."""
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "shared.weight",
)
OF_TOKENS = (
    *EMBEDDINGS,
    "lm_head.weight",
    "lm_head.bias",
    "embed_out.weight",
    "embed_out.bias",
    "predictions.bias",
    "predictions.decoder.weight",
    "predictions.decoder.bias",
    "lm_head.decoder.weight",
    "lm_head.decoder.bias",
    "vocab_projector.weight",
    "vocab_projector.bias",
)
"""Name endings of tensors with one row per token."""
_INPUT_SIDE = ("embed", "wte", "wpe")
_OUTPUT_SIDE = ("embed_out",)


class Shaped(Protocol):
    """Anything with a shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""


def in_component(name: str) -> tuple[str, str]:
    """Return the component that a tensor belongs to, with a slash at its end, and the tensor's name in it.

    >>> in_component("text_encoder/text_model.final_layer_norm.bias"), in_component("lm_head.weight")
    (('text_encoder/', 'text_model.final_layer_norm.bias'), ('', 'lm_head.weight'))
    """
    cut = name.rfind("/") + 1
    return name[:cut], name[cut:]


def is_embedding(name: str) -> bool:
    """Return whether a tensor is the embedding of tokens, by its name."""
    _, name = in_component(name)
    return name.endswith(tuple(f".{end}" for end in EMBEDDINGS)) or name in EMBEDDINGS


def is_head(name: str) -> bool:
    """Return whether a tensor is an output head, by its name."""
    return name in HEADS or name.endswith(tuple(f".{end}" for end in HEADS))


def has_tokens(name: str, shape: Sequence[int], n_rows: int) -> bool:
    """Return whether a tensor has one row for each of `n_rows` tokens, by its name and shape."""
    known = is_head(name) or name.endswith((*OF_TOKENS, ".embeddings.weight"))
    return known and bool(shape) and shape[0] == n_rows


def embedding_of(tensors: Mapping[str, Shaped]) -> str | None:
    """Return the name of a model's token embedding: the first tensor with such a name and with rows, or None."""
    known = (*EMBEDDINGS, ".embeddings.weight")
    return next((name for name in tensors if name.endswith(known) and len(tensors[name].shape) == 2), None)


def tied_to(tensors: Mapping[str, Shaped], config: Mapping[str, Any], head: str) -> str | None:
    """Return the embedding whose weights serve as a head that the model does not store; None if there is none.

    A model that neither stores nor declares a separate head is tied, as in `transformers`.
    """
    if not is_head(head) or head in tensors or flag_of(config) is False:
        return None
    found = [name for name in tensors if name.endswith(EMBEDDINGS) and len(tensors[name].shape) == 2]
    return found[0] if len(found) == 1 else None


_SHARED = late_pattern(r"(.*[./])?(shared|encoder\.embed_tokens|decoder\.embed_tokens)\.weight", re.DOTALL)
"""Names of the embedding that an encoder and a decoder share."""


def shared_as(tensors: Mapping[str, Shaped], name: str) -> str | None:
    """Return the name of the stored embedding that an encoder and a decoder share; None if it is not stored.

    PyTorch files store it under three names, safetensors files under one of them.
    """
    if name in tensors or (match := _SHARED.fullmatch(name)) is None:
        return None
    around = match[1] or ""
    ends = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
    return next((other for end in ends if (other := f"{around}{end}.weight") in tensors), None)


def flag_of(config: Mapping[str, Any]) -> bool | None:
    """Return `TIED` of a model's config, at the top or for its language model; None if neither sets it."""
    nested = [value for key, value in config.items() if key in LANGUAGE_PARTS]
    for part in (config, *(part for part in nested if isinstance(part, dict))):
        if isinstance(part.get(TIED), bool):
            return bool(part[TIED])
    return None


def is_input_side(name: str) -> bool:
    """Return whether a tensor outside the layers comes before them: an embedding, by its name.

    >>> [is_input_side(name) for name in ("model.embed_tokens.weight", "model.norm.weight", "embed_out.weight")]
    [True, False, False]
    """
    parts = name.lower().split(".")
    return not any(part in _OUTPUT_SIDE for part in parts) and any(
        word in part for part in parts for word in _INPUT_SIDE
    )


def count_layers(names: Iterable[str]) -> Mapping[str, int]:
    """Return the number of layers under each prefix, from the tensors' names alone.

    A tensor's layer is the first component of its name that is a number; its prefix is the text before it. Hence
    experts (``model.layers.3.mlp.experts.7.w1``) belong to layer 3, and the encoder and the decoder of one model are
    counted separately. The count is the highest number + 1. Gaps left by pruning, by `nn.Sequential` or by pipeline
    parallelism are counted too.

    A number at the beginning of the name counts only if it varies. The lone 0 of ``0.auto_model.encoder.layer.3``
    wraps a module, and the next number is the layer.

    >>> dict(count_layers(["embed.weight", "model.layers.0.up.weight", "model.layers.1.up.weight"]))
    {'model.layers': 2}
    """
    found = [list(_numbers(name)) for name in names]
    leading = {numbers[0][1] for numbers in found if numbers and numbers[0][0] == ""}
    counts: dict[str, int] = {}
    for numbers in found:
        if len(leading) == 1 and numbers and numbers[0][0] == "":
            numbers = numbers[1:]
        for prefix, number in numbers[:1]:
            counts[prefix] = max(counts.get(prefix, 0), number + 1)
    return counts


def layer_fraction(tensor_name: str, n_layers: Mapping[str, int]) -> float:
    """Return the tensor's relative depth: layer / (n_layers - 1), by the counts of `count_layers`.

    As in mergekit, it is 1 for the only layer of a stack, and 0 for every tensor outside the layers, including the
    final norm and the output head.

    >>> layer_fraction("model.layers.3.up.weight", {"model.layers": 7})
    0.5
    """
    for prefix, number in _numbers(tensor_name):
        if prefix in n_layers:
            last = n_layers[prefix] - 1
            return min(number / last, 1.0) if last > 0 else 1.0
    return 0.0


def place_of(name: str, n_layers: Mapping[str, int]) -> tuple[str, int, str] | None:
    """Return a tensor's stack, its layer and the rest of its name, by the counts of `count_layers`; None outside them.

    >>> place_of("model.layers.3.up.weight", {"model.layers": 7})
    ('model.layers', 3, 'up.weight')
    """
    for prefix, number in _numbers(name):
        if prefix in n_layers:
            return prefix, number, name[len(prefix) :].lstrip(".").partition(".")[2]
    return None


def _numbers(name: str) -> Iterator[tuple[str, int]]:
    """Yield (prefix, number) for each component of the name that is a layer number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isascii() and part.isdigit() and len(part) <= 9:
            yield ".".join(parts[:i]), int(part)


_EMBEDDING = late_pattern(
    r"(^|\.)(shared|wte|(tok|word|embed)_(embeddings?|tokens|in)|embedding|tokens_embed)\.weight$"
)
_TIED_HEAD = late_pattern(
    r"(^|\.)(lm_head|embed_out|proj_out|output_projection|vocab_projector|generator_lm_head|predictions\.decoder|"
    r"lm_head\.decoder)\.weight$"
)
_COPIES = (
    (late_pattern(r"(^|\.)(encoder|decoder)\.embed_tokens\.weight$"), _EMBEDDING),
    (
        late_pattern(r"(^|\.)(lm_head|predictions)\.decoder\.bias$"),
        late_pattern(r"(^|\.)(lm_head|predictions)\.bias$"),
    ),
)
"""Names of copies and of their originals, which hold whatever config.json says."""


def is_tied_copy(name: str, present: Collection[str], config: Mapping[str, Any]) -> bool:
    """Return whether a tensor is a copy of one that is `present`, by its name.

    An output head is a copy unless config.json says that it has its own weights.

    >>> is_tied_copy("decoder.embed_tokens.weight", ["shared.weight"], {})
    True
    >>> is_tied_copy("lm_head.weight", ["model.embed_tokens.weight"], {"tie_word_embeddings": False})
    False
    """
    copies = [*_COPIES, *([(_TIED_HEAD, _EMBEDDING)] if flag_of(config) is not False else [])]
    return any(
        copy.search(name) and any(original.search(other) for other in present if other != name)
        for copy, original in copies
    )


# Extra layers predict further tokens (multi-token prediction). They are stored after the last layer but do not count as
# layers. DeepSeek-V3 and GLM-4.5 continue the numbers of the layers; Qwen3-Next and MiMo use separate names
# (``mtp.layers.0``, ``model.mtp_layers.0``).

DECLARED = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "mtp_num_layers")
"""Keys of config.json that count the extra layers."""
_EXTRA_MARKS = frozenset({"eh_proj", "enorm", "hnorm", "shared_head"})
"""Name components that only an extra layer has."""
_EXTRA_STACKS = frozenset(
    {"mtp", "mtp_layers", "mtp_block", "mtp_blocks", "mtp_module", "mtp_modules", "nextn"}
)
"""Name components of separate stacks of extra layers."""
_OTHER_STACKS = ("vis", "vit", "audio", "encoder")
"""Name components of stacks that do not predict tokens."""


def lies_apart(name: str) -> bool:
    """Return whether a tensor's name shows that it belongs to a separate stack of extra layers.

    >>> lies_apart("mtp.layers.0.mlp.gate.weight"), lies_apart("model.layers.0.mlp.gate.weight")
    (True, False)
    """
    return not _EXTRA_STACKS.isdisjoint(name.lower().split("."))


def count_real(
    names: Iterable[str], config: Mapping[str, Any]
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Return the number of layers of each stack, as `count_layers` does, and the number of its extra layers.

    Extra layers are recognised by their names, or else by a config that declares them and counts fewer layers than
    are stored.

    >>> names = [f"model.layers.{i}.up.weight" for i in range(3)] + ["model.layers.2.eh_proj.weight"]
    >>> count_real(names, {})
    ({'model.layers': 2}, {'model.layers': 1})
    """
    names = [name for name in names if not lies_apart(name)]
    stored = count_layers(names)
    marked = _marked(names, stored)
    extra = {prefix: _trailing(count, marked.get(prefix, set())) for prefix, count in stored.items()}
    declared = _declared(config)
    for prefix, count in stored.items():
        if declared and not extra[prefix] and not any(word in prefix.lower() for word in _OTHER_STACKS):
            extra[prefix] = next((more for real, more in declared if real + more == count), 0)
    return {prefix: count - extra[prefix] for prefix, count in stored.items()}, extra


def depth_of(name: str, counts: Mapping[str, int]) -> float:
    """Return a tensor's depth as `layer_fraction` does; an extra layer has the depth of the last layer."""
    return 1.0 if lies_apart(name) else layer_fraction(name, counts)


def _declared(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the pairs (layers, extra layers) that a config declares for the language model."""
    parts = [config, *(config.get(name) for name in LANGUAGE_PARTS)]
    pairs = [
        (part.get("num_hidden_layers"), part.get(key))
        for part in parts
        if isinstance(part, Mapping)
        for key in DECLARED
    ]
    return [
        (real, more)
        for real, more in pairs
        if type(real) is int and type(more) is int and real > 0 and more > 0
    ]


def _marked(names: Iterable[str], stored: Mapping[str, int]) -> dict[str, set[int]]:
    """Return the indices of each stack's layers that have a name only an extra layer has."""
    found: dict[str, set[int]] = {}
    for parts in (name.split(".") for name in names):
        if _EXTRA_MARKS.isdisjoint(parts):
            continue
        for place, part in enumerate(parts):
            prefix = ".".join(parts[:place])
            if part.isascii() and part.isdigit() and prefix in stored:
                found.setdefault(prefix, set()).add(int(part[:9]))
                break
    return found


def _trailing(count: int, marked: set[int]) -> int:
    """Return the number of marked layers at the end; 0 if all are marked, as in a different kind of model."""
    n = next((n for n in range(count) if count - 1 - n not in marked), count)
    return n if n < count else 0
