"""Names of tensors, and of the settings that concern them: the only lists of what architectures call things."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

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
"""Ends of the names of tensors with a row for each token."""
_INPUT_SIDE = ("embed", "wte", "wpe")
_OUTPUT_SIDE = ("embed_out",)


class Shaped(Protocol):
    """Anything with a shape."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""


def is_embedding(name: str) -> bool:
    """Return whether a tensor is the embedding of tokens, by its name."""
    return name.endswith(tuple(f".{end}" for end in EMBEDDINGS)) or name in EMBEDDINGS


def is_head(name: str) -> bool:
    """Return whether a tensor is an output head, by its name."""
    return name in HEADS or name.endswith(tuple(f".{end}" for end in HEADS))


def has_tokens(name: str, shape: Sequence[int], n_rows: int) -> bool:
    """Return whether a tensor has a row for each of `n_rows` tokens, by its name and shape."""
    known = is_head(name) or name.endswith((*OF_TOKENS, ".embeddings.weight"))
    return known and bool(shape) and shape[0] == n_rows


def embedding_of(tensors: Mapping[str, Shaped]) -> str | None:
    """Return the name of a model's token embedding: the first that is one by name and has rows; None without any."""
    known = (*EMBEDDINGS, ".embeddings.weight")
    return next((name for name in tensors if name.endswith(known) and len(tensors[name].shape) == 2), None)


def tied_to(tensors: Mapping[str, Shaped], config: Mapping[str, Any], head: str) -> str | None:
    """Return the embedding whose weights serve as a head that a model does not store; None if there is none.

    A model that stores no head and does not declare one of its own is tied: `transformers` reads it this way.
    """
    if not is_head(head) or head in tensors or flag_of(config) is False:
        return None
    found = [name for name in tensors if name.endswith(EMBEDDINGS) and len(tensors[name].shape) == 2]
    return found[0] if len(found) == 1 else None


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

    A tensor's layer is the first component of its name that is a number; its prefix is the text
    before. So experts (``model.layers.3.mlp.experts.7.w1``) belong to layer 3, and the encoder and
    the decoder of one model are counted apart. The count is the highest number + 1: gaps, as
    pruning, `nn.Sequential` or a share of a pipeline leave them, keep their place.

    A number that begins the name counts only if it varies: the lone 0 of
    ``0.auto_model.encoder.layer.3`` wraps a module, and the next number is the layer.

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

    As in mergekit it is 1 for the only layer of a stack, and 0 for every tensor outside the
    layers, the final norm and the output head included.

    >>> layer_fraction("model.layers.3.up.weight", {"model.layers": 7})
    0.5
    """
    for prefix, number in _numbers(tensor_name):
        if prefix in n_layers:
            last = n_layers[prefix] - 1
            return min(number / last, 1.0) if last > 0 else 1.0
    return 0.0


def _numbers(name: str) -> Iterator[tuple[str, int]]:
    """Yield (prefix, number) for each component of the name that is a layer number."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isascii() and part.isdigit() and len(part) <= 9:
            yield ".".join(parts[:i]), int(part)
