"""Turn the lines of a file into a model's examples, with its own tokenizer, labels and limits."""

from __future__ import annotations

from streammerge.checkpoint.index import TensorIndex
from streammerge.errors import InputError, printable
from streammerge.estimate.network.examples import Reading, Tokenize
from streammerge.estimate.network.skeleton import CAUSAL, Skeleton


def reading_for(
    skeleton: Skeleton, index: TensorIndex, max_length: int, *, with_labels: bool = False
) -> Reading:
    """Return the settings for reading a model's examples, with labels if requested."""
    longest = min(max_length, skeleton.positions or max_length)
    return Reading(
        max_length=longest,
        min_length=2 if skeleton.kind == CAUSAL else 1,
        vocabulary=skeleton.vocabulary,
        tokenize=lambda: _tokenizer(index, longest),
        labels=skeleton.label_numbers if with_labels else None,
    )


def _tokenizer(index: TensorIndex, max_length: int) -> Tokenize:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(index.directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # foreign files may raise anything in the library
        raise InputError(
            f"{printable(index.reference)}: cannot load a tokenizer for text: "
            f"{printable(str(error).strip() or type(error).__name__, 300)}; give input_ids instead"
        ) from error

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        return ids

    return tokenize
