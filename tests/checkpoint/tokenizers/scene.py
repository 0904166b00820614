"""Small models with tokenizers, written as plain JSON, and the rows of an aligned vocabulary by loops over tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

EMBEDDING, HEAD, OTHER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.w.weight"
WIDTH = 6


@dataclass
class Model:
    """A model on disk."""

    path: Path
    ids: dict[str, int]
    tensors: dict[str, torch.Tensor]

    @property
    def n_rows(self) -> int:
        return int(self.tensors[EMBEDDING].shape[0])


def write_tokenizer(
    directory: Path, words: Mapping[str, int], added: Mapping[str, int] | None = None, **settings: Any
) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` of a byte-pair tokenizer without merges."""
    directory.mkdir(parents=True, exist_ok=True)
    entries = [
        {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for text, number in (added or {}).items()
    ]
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": entries,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": dict(words),
            "merges": [],
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(data))
    entry = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (directory / "tokenizer_config.json").write_text(json.dumps(entry))


def write(
    directory: Path,
    words: Mapping[str, int],
    *,
    added: Mapping[str, int] | None = None,
    n_rows: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    head: bool = True,
    config: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Model:
    """Write a model and its tokenizer; by default it has a row for each number."""
    write_tokenizer(directory, words, added, **settings)
    ids = {**words, **(added or {})}
    n_rows = n_rows or max(ids.values()) + 1
    generator = torch.Generator().manual_seed(seed)
    shapes = {EMBEDDING: (n_rows, WIDTH), OTHER: (4, 5)} | ({HEAD: (n_rows, WIDTH)} if head else {})
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    entries = {"model_type": "llama", "vocab_size": n_rows, **(config or {})}
    (directory / "config.json").write_text(json.dumps(entries))
    return Model(directory, ids, tensors)


def words(texts: str, start: int = 0) -> dict[str, int]:
    """Return one token for each letter, numbered in order."""
    return {text: start + i for i, text in enumerate(texts)}


def rows_by_token(
    models: Sequence[Model], base: int, ids: Mapping[str, int], n_rows: int, name: str
) -> list[torch.Tensor]:
    """Return each model's tensor in the output's order, in fp64, by the rule that the documentation gives."""
    text_of = {number: text for text, number in ids.items()}
    found = []
    for model in models:
        rows = torch.zeros(n_rows, WIDTH, dtype=torch.float64)
        for number in range(n_rows):
            having = [_own(m, text_of.get(number), number, set(text_of), name) for m in models]
            mine = having[models.index(model)]
            some = [row for row in having if row is not None]
            if mine is None and having[base] is not None:
                mine = having[base]
            elif mine is None and some:
                mine = torch.stack(some).mean(dim=0)
            if mine is not None:
                rows[number] = mine
        found.append(rows)
    return found


def _own(model: Model, text: str | None, number: int, named: set[int], name: str) -> torch.Tensor | None:
    """Return a model's own row of a token; of a row that no token names, the one at its place."""
    tensor = model.tensors.get(name, model.tensors[EMBEDDING]).double()
    if text is not None:
        row = model.ids.get(text, -1)
        return tensor[row] if 0 <= row < len(tensor) else None
    free = number < len(tensor) and number not in model.ids.values()
    return tensor[number] if free and number not in named else None
