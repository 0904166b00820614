"""The prompts of a mixture's experts as tokens of the base model, each prompt alone."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streammerge.checkpoint.index import TensorIndex
from streammerge.checkpoint.sidecar_names import is_tokenizer_file
from streammerge.config.moe import ExpertSpec
from streammerge.errors import ConfigError, ModelError, printable
from streammerge.estimate.network.examples import Example
from streammerge.estimate.network.tokenizing import load_tokenizer
from streammerge.records import dataclass
from streammerge.units import plural


@dataclass(frozen=True)
class Prompts:
    """The prompts of all experts. A prompt that several experts have is one example."""

    examples: tuple[Example, ...]
    """The distinct prompts, shortest first."""
    positive: tuple[tuple[int, ...], ...]
    """For each expert, the indices of its positive prompts among `examples`."""
    negative: tuple[tuple[int, ...], ...]

    def gates_of(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the gate of each expert, [experts, hidden], of length 1; zeros if its prompts cancel out.

        Parameters
        ----------
        features
            One vector for each example, [examples, hidden].
        """
        rows = []
        for positive, negative in zip(self.positive, self.negative, strict=True):
            row = _mean(features, positive)
            if negative:
                row = row - _mean(features, negative)
            rows.append(row / max(float(np.sqrt((row * row).sum())), _LEAST_NORM))
        return np.stack(rows)


_LEAST_NORM = 1e-8
_CURE = "copy the tokenizer's files into its folder, or use gate_mode 'random'"


def _mean(features: NDArray[np.float64], chosen: Sequence[int]) -> NDArray[np.float64]:
    total = np.zeros(features.shape[1])
    for i in chosen:  # one after the other, so that the sum has one order
        total += features[i]
    return total / len(chosen)


def tokenized(
    base: TensorIndex, experts: Sequence[ExpertSpec], vocabulary: int, longest: int | None
) -> Prompts:
    """Return the prompts as tokens: the tokenizer's BOS, if it has one, and the tokens of the text.

    Parameters
    ----------
    vocabulary
        Upper bound (exclusive) of token ids.
    longest
        Most tokens of a prompt; None: no limit.

    Raises
    ------
    ConfigError
        If a prompt has no token, or too many.
    InputError
        If the tokenizer cannot be loaded.
    """
    if not any(is_tokenizer_file(name) for name in os.listdir(base.directory)):
        # transformers may make one with an empty vocabulary.
        raise ModelError(f"{printable(base.reference)}: has no tokenizer to read the prompts with: {_CURE}")
    tokenizer = load_tokenizer(base, _CURE)
    bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    known: dict[tuple[int, ...], int] = {}

    def number(text: str, place: str) -> int:
        ids = (*bos, *(int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]))
        if not ids:
            raise ConfigError(f"{place}: has no tokens: write a longer prompt")
        if max(ids) >= vocabulary:
            raise ConfigError(
                f"{place}: the tokenizer returns id {max(ids)}, but the base model has {vocabulary} ids: check the tokenizer"
            )
        if longest is not None and len(ids) > longest:
            raise ConfigError(
                f"{place}: has {plural(len(ids), 'token')}, but the base model reads at most {longest}: shorten it"
            )
        return known.setdefault(ids, len(known))

    numbers = [
        [
            [number(text, f"{expert.path}.{key}[{i}]") for i, text in enumerate(texts)]
            for key, texts in (("positive_prompts", expert.positive), ("negative_prompts", expert.negative))
        ]
        for expert in experts
    ]
    order = sorted(known, key=lambda ids: (len(ids), ids))
    place_of = {known[ids]: place for place, ids in enumerate(order)}
    examples = tuple(Example(i, np.asarray(ids, np.int64)) for i, ids in enumerate(order))
    positive, negative = (
        tuple(tuple(place_of[n] for n in of_expert[side]) for of_expert in numbers) for side in (0, 1)
    )
    return Prompts(examples, positive, negative)
